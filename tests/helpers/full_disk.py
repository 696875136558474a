"""A small file system of the test's own that can be filled to the last byte."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from pathlib import Path

SIZE = 64 * 1024 * 1024


class SmallDisk:
    """A tmpfs.

    Attributes:
        path: where it is mounted; short, since Ray makes sockets below it.
    """

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="disk-", dir="/tmp"))
        self._filler = self.path / "filler"
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(self.path)],
            check=True, capture_output=True, timeout=20,
        )  # fmt: skip

    def fill(self) -> None:
        """Until nothing fits any more."""
        with self._filler.open("ab", buffering=0) as filler, contextlib.suppress(OSError):
            while filler.write(bytes(64 * 1024)):
                pass
        with self._filler.open("ab", buffering=0) as filler, contextlib.suppress(OSError):
            while filler.write(b"x"):
                pass

    def free(self) -> None:
        """All that :meth:`fill` took."""
        self._filler.unlink(missing_ok=True)

    def close(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.path)], check=True, capture_output=True, timeout=20)
        self.path.rmdir()

    def __enter__(self) -> SmallDisk:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def why_no_small_disk() -> str | None:
    """Why this machine cannot mount one; None if it can."""
    if os.geteuid() != 0:
        return "mounting a tmpfs needs root"
    try:
        SmallDisk().close()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"no right to mount a tmpfs ({getattr(error, 'stderr', None) or error})"
    return None
