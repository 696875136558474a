"""Values that are made of files, and made again when the files change, without a restart."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from preconditioner_service.files import FileError, Signature, signature
from preconditioner_service.logs import event

POLL_SECONDS = 1.0
"""Between looks at the files. A change holds once it was seen twice, so that no file is read while it is
being written: within three periods."""

T = TypeVar("T")


class Reloading(Generic[T]):
    """The value of some files. Safe to use from several threads.

    Args:
        what: it is, for the log.
        paths: of the files.
        load: makes the value; raises ``FileError``.

    Attributes:
        value: made of the last good content.

    Raises:
        FileError: the first value cannot be made.
    """

    def __init__(self, what: str, paths: Sequence[Path], load: Callable[[], T]) -> None:
        self._what = what
        self._paths = tuple(paths)
        self._load = load
        self._lock = threading.Lock()
        self._tried = self._seen = signature(*self._paths)
        self._problem = ""
        self.value = load()

    def refresh(self, *, at_once: bool = False) -> bool:
        """Look at the files; make the value again if they changed, and not since the last look.

        Content that is no good changes nothing and is logged, once per problem.

        Args:
            at_once: do not wait for a second look.

        Returns:
            Whether there is a new value.
        """
        with self._lock:
            now = signature(*self._paths)
            steady = self._steady(now)
            if now == self._tried or not (steady or at_once):
                return False
            self._tried = now
            try:
                self.value = self._load()
            except Exception as error:  # whatever it is, other files must go on being looked at
                # Texts of other errors may show what a file holds.
                problem = str(error) if isinstance(error, FileError) else type(error).__name__
                if problem != self._problem:
                    self._problem = problem
                    event(
                        logging.ERROR,
                        "not reloaded",
                        what=self._what,
                        reason=problem,
                        note="the last good one holds",
                    )
                return False
            self._problem = ""
            event(logging.INFO, "reloaded", what=self._what)
            return True

    def _steady(self, now: Signature) -> bool:
        steady, self._seen = now == self._seen, now
        return steady
