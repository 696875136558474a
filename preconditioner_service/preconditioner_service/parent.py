"""The end of an embedded service when its trainer is gone, however that came about.

Two signs are watched, since neither is enough: end of file on stdin, which comes at once but not while a
forked child of the trainer (a DataLoader worker, say) holds the pipe open; and the change of the parent's
process id, looked at twice a second.
"""

from __future__ import annotations

import os
import stat
import sys
import threading
import time
from collections.abc import Callable

_PERIOD = 0.5
_LAST_RESORT = 8.0
"""Seconds after which the process ends hard, should the orderly stop hang."""


class ParentWatch:
    """Calls back once, from a thread of its own, when the parent is gone.

    Args:
        parent_pid: the parent's process id, as it knows it itself. (If the parent died before this was
            made, its id is not ``os.getppid()`` any more, which is noticed at the first look.)
        gone: called with the sign that was seen; must not block.
    """

    def __init__(self, parent_pid: int, gone: Callable[[str], None]) -> None:
        self._parent_pid = parent_pid
        self._gone = gone
        self._once = threading.Lock()

    def start(self) -> None:
        """Begin to watch."""
        threading.Thread(target=self._watch_pid, name="parent-pid", daemon=True).start()
        if _is_pipe(sys.stdin.fileno() if sys.stdin is not None else -1):
            threading.Thread(target=self._watch_stdin, name="parent-stdin", daemon=True).start()

    def _watch_pid(self) -> None:
        while os.getppid() == self._parent_pid:
            time.sleep(_PERIOD)
        self._tell("its process id changed")

    def _watch_stdin(self) -> None:
        descriptor = sys.stdin.fileno()
        try:
            while os.read(descriptor, 4096):
                pass
        except OSError:
            pass
        self._tell("end of file on stdin")

    def _tell(self, sign: str) -> None:
        if not self._once.acquire(blocking=False):
            return
        self._gone(sign)
        time.sleep(_LAST_RESORT)
        os._exit(1)


def _is_pipe(descriptor: int) -> bool:
    # A terminal or /dev/null tells nothing of the parent: the latter is at its end from the start.
    if descriptor < 0:
        return False
    try:
        mode = os.fstat(descriptor).st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)
