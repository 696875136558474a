"""Ends what is left of a private Ray when its service is gone, even by SIGKILL, and removes its directory.

A script of its own, for the standard library alone: ``python -I -S reaper.py DIRECTORY``. It waits for end of
file on stdin, whose other end the service holds. Most of Ray's processes die with their parent by the
kernel's doing, but a raylet's agents stay for a minute and more. All are known by the files that they hold
open in the directory: their logs and sockets. (Not by their environment, which Ray overwrites with titles.)
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

_PATIENCE = 10.0
_PERIOD = 0.05


def holders(directory: str, spared: set[int]) -> Iterator[int]:
    """Process ids of those who hold files below a directory open."""
    for process in Path("/proc").iterdir():
        if process.name.isdecimal() and int(process.name) not in spared:
            try:
                if any(_target(link).startswith(directory + "/") for link in (process / "fd").iterdir()):
                    yield int(process.name)
            except OSError:  # gone, or another user's
                continue


def _target(link: Path) -> str:
    try:
        return str(link.readlink())
    except OSError:  # closed meanwhile
        return ""


def main() -> None:
    """Wait, then end and remove everything."""
    directory = sys.argv[1]
    spared = {os.getpid(), os.getppid()}  # Ray has files open in the service itself too
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # whoever ends the service in that way ends the wait too
    while os.read(0, 4096):
        pass
    until = time.monotonic() + _PATIENCE
    while (left := list(holders(directory, spared))) and time.monotonic() < until:
        for process in left:
            try:
                os.kill(process, signal.SIGKILL)
            except OSError:  # gone meanwhile
                continue
        time.sleep(_PERIOD)
    shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
