"""The processes that a soak torments: jobs, their lives, and the service."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from preconditioner_worker.faults.proxy import Proxy
from preconditioner_worker.faults.service import LocalService, ServiceError
from preconditioner_worker.faults.trainee import Mode

_END_SECONDS = 20.0


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
    """

    name: str
    mode: Mode
    link: Proxy
    folder: Path
    token: str
    seed: int
    lives: int = 0
    _process: subprocess.Popen[bytes] | None = None
    _zombies: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def histories(self) -> list[Path]:
        """Of all lives."""
        return [self._history(life) for life in range(self.lives)]

    def start(self) -> None:
        """Begin a life, from the checkpoint if there is one, and return when it takes signals.

        Raises:
            ServiceError: it ended at once.
        """
        history = self._history(self.lives)
        self.lives += 1
        with (self.folder / f"{self.name}.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    sys.executable, "-m", "preconditioner_worker.faults.trainee",
                    "--job", self.name, "--mode", self.mode, "--address", self.link.address,
                    "--history", str(history), "--matrices", str(self.folder / "matrices"),
                    "--checkpoint", str(self.folder / f"{self.name}.pt"), "--seed", str(self.seed),
                ],
                env={**os.environ, "PRECONDITIONER_TOKEN": self.token, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=log,
            )  # fmt: skip
        assert self._process.stdout is not None
        with self._process.stdout as said:
            if said.readline() != b"ready\n":
                raise ServiceError(f"job {self.name} did not start; see {self.folder / f'{self.name}.log'}")

    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process."""
        if self._process is not None:
            self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, without notice."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def leave_behind(self) -> None:
        """The process is a zombie from now on: the next life begins beside it."""
        if self._process is not None:
            self._zombies.append(self._process)

    def wake_zombies(self) -> None:
        """Those that were frozen go on as if nothing had been."""
        for zombie in self._zombies:
            zombie.send_signal(signal.SIGCONT)

    def end_zombies(self) -> None:
        """No more of them."""
        while self._zombies:
            zombie = self._zombies.pop()
            zombie.kill()
            zombie.wait()

    def stop(self) -> int | None:
        """End in order; returns the exit status, negative after a kill."""
        self.end_zombies()
        if self._process is None:
            return None
        self._process.send_signal(signal.SIGCONT)
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(_END_SECONDS)
        self.kill()
        return self._process.returncode

    def _history(self, life: int) -> Path:
        return self.folder / f"{self.name}-{life}.jsonl"


def actors(service: LocalService) -> list[psutil.Process]:
    """The processes of a service in which Ray computes roots; of its own tree alone."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(service.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if "ray::RootWorker" in " ".join(process.cmdline()):
                    found.append(process)
    return found
