"""What a subprocess writes, into a bounded file and to logging at DEBUG."""

from __future__ import annotations

import logging
import threading
from collections import deque
from pathlib import Path
from typing import IO

logger = logging.getLogger("preconditioner_client.embedded")

_FILE_BYTES = 1024 * 1024
_LINE_BYTES = 4096
_TAIL_LINES = 20


class Relay:
    """Takes lines from any number of threads.

    Args:
        path: begun anew; beyond 1 MiB its content moves to ``path.1``, which is replaced each time.
    """

    def __init__(self, path: Path) -> None:
        self.reason: str | None = None
        """Why the subprocess could not be started, as far as it said so itself."""
        self._path = path
        self._lock = threading.Lock()
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._file: IO[bytes] | None = path.open("wb", buffering=0)
        self._written = 0

    def run(self, stream: IO[bytes]) -> None:
        """Take lines until the stream ends."""
        while line := stream.readline(_LINE_BYTES):
            self.write(line)

    def write(self, line: bytes) -> None:
        """Take one line."""
        text = line.decode(errors="replace").rstrip()
        logger.debug("%s", text)
        with self._lock:
            self._tail.append(text)
            if self._file is None:
                return
            try:
                if self._written + len(line) > _FILE_BYTES:
                    self._file.close()
                    self._path.replace(self._path.with_suffix(self._path.suffix + ".1"))
                    self._file = self._path.open("wb", buffering=0)
                    self._written = 0
                self._written += self._file.write(line) or 0
            except OSError:  # a full disk must not stop the reading, or the subprocess would block on us
                self._file = None

    def tail(self) -> str:
        """The last lines."""
        with self._lock:
            return "\n".join(self._tail)

    def close(self) -> None:
        """Close the file; later lines go to logging only."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None
