"""The processes that a soak torments: jobs, their lives, and the service."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil

from preconditioner_worker.faults.proxy import Proxy
from preconditioner_worker.faults.service import LocalService, ServiceError
from preconditioner_worker.faults.trainee import Mode, live

_START_SECONDS = 120.0
_END_SECONDS = 20.0

# Forked from a process that has torch already: a life begins within a moment, not after seconds of imports.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["preconditioner_worker.faults.trainee"])


@dataclass
class Job:
    """One training job: a link of its own to the service, and the process that lives now.

    Attributes:
        name: of the job.
        mode: of adoption.
        link: between it and the service.
        folder: of its files.
        token: of the service.
        seed: of its weights.
        lives: processes so far; every one has a history file of its own.
        killed: ids of those that were killed as a fault; all others must end in order.
    """

    name: str
    mode: Mode
    link: Proxy
    folder: Path
    token: str
    seed: int
    lives: int = 0
    killed: set[int] = field(default_factory=set)
    _process: BaseProcess | None = None
    _zombies: list[BaseProcess] = field(default_factory=list)

    @property
    def histories(self) -> list[Path]:
        """Of all lives."""
        return [self._history(life) for life in range(self.lives)]

    def start(self) -> None:
        """Begin a life, from the checkpoint if there is one, and return when it takes signals.

        Raises:
            ServiceError: it ended at once.
        """
        settings = {
            "job": self.name,
            "mode": self.mode,
            "address": self.link.address,
            "token": self.token,
            "history": self._history(self.lives),
            "matrices": self.folder / "matrices",
            "checkpoint": self.folder / f"{self.name}.pt",
            "seed": self.seed,
        }
        self.lives += 1
        log = self.folder / f"{self.name}.log"
        reader, writer = _CONTEXT.Pipe(duplex=False)
        self._process = _CONTEXT.Process(target=live, args=(settings, log, writer), daemon=True)
        self._process.start()
        writer.close()
        with reader, contextlib.suppress(EOFError):
            if reader.poll(_START_SECONDS):
                reader.recv_bytes()
                return
        raise ServiceError(f"job {self.name} did not start; see {log}")

    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.is_alive()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process."""
        _send(self._process, number)

    def kill(self) -> None:
        """SIGKILL, without notice."""
        self._kill(self._process)

    def leave_behind(self) -> None:
        """The process is a zombie from now on: the next life begins beside it."""
        if self._process is not None:
            self._zombies.append(self._process)

    def wake_zombies(self) -> None:
        """Those that were frozen go on as if nothing had been."""
        for zombie in self._zombies:
            _send(zombie, signal.SIGCONT)

    def end_zombies(self) -> None:
        """No more of them."""
        while self._zombies:
            self._kill(self._zombies.pop())

    def stop(self) -> None:
        """End in order, or hard if that takes too long."""
        self.end_zombies()
        if self._process is not None:
            _send(self._process, signal.SIGCONT)
            _send(self._process, signal.SIGTERM)
            self._process.join(_END_SECONDS)
            # Not as a fault: one that does not end by itself hangs, and the checker is to say so.
            self._process.kill()
            self._process.join()

    def _kill(self, process: BaseProcess | None) -> None:
        if process is None:
            return
        if process.pid is not None and process.is_alive():
            self.killed.add(process.pid)
        process.kill()
        process.join()

    def _history(self, life: int) -> Path:
        return self.folder / f"{self.name}-{life}.jsonl"


def _send(process: BaseProcess | None, number: signal.Signals) -> None:
    if process is not None and process.pid is not None and process.is_alive():
        os.kill(process.pid, number)


def actors(service: LocalService) -> list[psutil.Process]:
    """The processes of a service in which Ray computes roots; of its own tree alone."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(service.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if "ray::RootWorker" in " ".join(process.cmdline()):
                    found.append(process)
    return found
