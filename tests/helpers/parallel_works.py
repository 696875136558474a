"""Works for a pool of processes; in a module of their own, since spawned processes import what they run."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def meet(folder: Path, own: str, other: str, *, report) -> str:
    """Ends only if the other is under way at the same time."""
    (folder / own).touch()
    report(1)
    deadline = time.monotonic() + 60
    while not (folder / other).exists():
        assert time.monotonic() < deadline, f"{other} did not begin beside {own}"
        time.sleep(0.01)
    return f"{own} met {other} in process {os.getpid()}"


def answer(number: int, *, report) -> str:
    return f"{number} in process {os.getpid()}"


def die(*, report) -> str:
    os.kill(os.getpid(), signal.SIGKILL)
    return "never"
