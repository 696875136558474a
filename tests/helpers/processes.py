"""Other processes, looked at and killed. One may end between any two questions; nothing here raises then."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import psutil


def family(pid: int) -> list[psutil.Process]:
    """A process and all below it; empty if it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []


def command_line(process: psutil.Process) -> str:
    """Empty if it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


def named(name: str, processes: Iterable[psutil.Process]) -> psutil.Process:
    """The first that has this name.

    Raises:
        LookupError: none has.
    """
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name() == name:
                return process
    raise LookupError(f"no process {name!r} here")


def alive(process: psutil.Process) -> bool:
    """False for a zombie too: where there is no init, as in a container, nobody waits for it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def listening(processes: Iterable[psutil.Process]) -> set[tuple[str, int]]:
    """Addresses and ports on which one of them takes TCP connections."""
    found = set()
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    found.add((connection.laddr.ip, connection.laddr.port))
    return found


def gone(processes: Iterable[psutil.Process]) -> bool:
    """Whether none of them is alive."""
    return not any(alive(process) for process in processes)


def kill(processes: Iterable[psutil.Process]) -> None:
    """SIGKILL to each that still runs."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
