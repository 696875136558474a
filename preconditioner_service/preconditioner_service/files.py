"""Files that an operator may replace while the service runs: tokens, keys, certificates, the jobs file."""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from pathlib import Path
from typing import TypeAlias

from preconditioner_service.logs import event

Signature: TypeAlias = "tuple[tuple[int, ...] | None, ...]"

_MOST_BYTES = 16 * 1024 * 1024


class FileError(Exception):
    """A file cannot be used; the text names it and the way out, and shows nothing of what it holds."""


def signature(*paths: Path) -> Signature:
    """What changes when one of the files does. Links are followed, as Kubernetes swaps them."""
    return tuple(_signature(path) for path in paths)


def _signature(path: Path) -> tuple[int, ...] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def read(path: Path, what: str) -> bytes:
    """The bytes of a file that others must not be able to change.

    Args:
        path: of the file.
        what: the setting that names it, for errors.

    Raises:
        FileError: it cannot be read, is larger than any such file, or every user of the machine may write it.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise FileError(f"{what} {path}: {error.strerror}") from None
    if len(data) > _MOST_BYTES:
        raise FileError(f"{what} {path}: larger than {_MOST_BYTES} bytes")
    if mode & stat.S_IWOTH:
        raise FileError(f"{what} {path}: every user of this machine may change it; chmod o-w {path}")
    return data


def warn_if_exposed(path: Path) -> None:
    """Log it if every user of the machine may read a file that holds a secret."""
    with contextlib.suppress(OSError):
        if path.stat().st_mode & stat.S_IROTH:
            event(
                logging.WARNING,
                "secret readable by every user of this machine",
                file=path,
                way_out=f"chmod o-r {path}",
            )


def write_new(path: Path, data: bytes, mode: int) -> None:
    """Write a file that is not there yet, with this mode from its first byte on.

    Raises:
        OSError: it is there (``FileExistsError``), or cannot be written.
    """
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        os.fchmod(file.fileno(), mode)  # whatever the umask says
        file.write(data)
