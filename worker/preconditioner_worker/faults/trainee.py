"""A small training job in a process of its own, made to be killed, frozen, resumed and spoilt.

SIGUSR1 puts a NaN into the statistics of one block, SIGUSR2 puts back what was there, SIGTERM ends the job in
order. It ends by itself when its parent is gone.
"""

from __future__ import annotations

import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from preconditioner_client import BlockingConfig, ServiceConfig, Shampoo, StalenessConfig

Mode = Literal["eager", "scheduled"]

MAX_STALENESS = 100
REFRESH_EVERY = 20
STALE_TIMEOUT = 3.0
PAUSE = 0.02
"""Seconds between two steps, which leave the cores to others."""

_CHECKPOINT_EVERY = 25


class Trainee:
    """One life of a job.

    Args:
        job: its name.
        mode: of adoption; what is due beyond the bound is waited for in both.
        address: of the service.
        token: of the service.
        history: file to record to.
        matrices: folder of the matrices.
        checkpoint: file of the checkpoint, which is resumed if it is there.
        seed: of weights and batches.
    """

    def __init__(
        self,
        *,
        job: str,
        mode: Mode,
        address: str,
        token: str,
        history: Path,
        matrices: Path,
        checkpoint: Path,
        seed: int,
    ) -> None:
        torch.manual_seed(seed)
        self._model = nn.Sequential(
            nn.Linear(24, 48), nn.Tanh(), nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 8)
        )
        self._inputs, self._targets = torch.randn(64, 24), torch.randn(64, 8)
        delay = REFRESH_EVERY if mode == "scheduled" else None
        self._optimizer = Shampoo(
            self._model.named_parameters(),
            lr=1e-3,
            blocking=BlockingConfig(block_size=48),
            staleness=StalenessConfig(
                max_staleness=MAX_STALENESS,
                refresh_every=REFRESH_EVERY,
                adoption=mode,
                delay=delay,
                stale_timeout=STALE_TIMEOUT,
            ),
            job=job,
            service=ServiceConfig(
                address=address, token=token, history_file=str(history), history_matrices=str(matrices)
            ),
        )
        self._checkpoint = checkpoint
        self._parent = os.getppid()
        self._stopped = False
        self._spoil = False
        self._mend = False
        self._spoilt: list[tuple[torch.Tensor, torch.Tensor]] = []
        if checkpoint.exists():
            saved = torch.load(checkpoint, weights_only=True)
            self._model.load_state_dict(saved["model"])
            self._optimizer.load_state_dict(saved["optimizer"])

    def listen(self) -> None:
        """Take signals."""
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "_stopped", True))
        signal.signal(signal.SIGUSR1, lambda *_: setattr(self, "_spoil", True))
        signal.signal(signal.SIGUSR2, lambda *_: setattr(self, "_mend", True))

    def run(self) -> None:
        """Train until told to stop."""
        step = 0
        while not self._stopped and os.getppid() == self._parent:
            self._optimizer.zero_grad()
            noise = 0.1 * torch.randn_like(self._inputs)
            nn.functional.mse_loss(self._model(self._inputs + noise), self._targets).backward()
            self._optimizer.step()
            step += 1
            # Never with spoilt statistics: a checkpoint is what a person would resume from.
            if step % _CHECKPOINT_EVERY == 0 and not self._spoilt:
                self._save()
            self._obey()
            time.sleep(PAUSE)
        self._optimizer.close()

    def _save(self) -> None:
        part = self._checkpoint.with_suffix(f".{os.getpid()}")
        torch.save({"model": self._model.state_dict(), "optimizer": self._optimizer.state_dict()}, part)
        part.replace(self._checkpoint)

    def _obey(self) -> None:
        if self._spoil:
            self._spoil = False
            for statistics in self._statistics()[:1]:
                self._spoilt.append((statistics, statistics.clone()))
                statistics[0, 0] = float("nan")
        if self._mend:
            self._mend = False
            while self._spoilt:
                statistics, sound = self._spoilt.pop()
                statistics.copy_(sound)

    def _statistics(self) -> list[torch.Tensor]:
        """The statistics themselves: after ``state_dict()`` the optimizer's state shows them."""
        self._optimizer.state_dict()
        states: list[dict[str, Any]] = list(self._optimizer.state.values())
        return [state[key] for state in states for key in sorted(state) if ".statistics." in key]


def live(settings: dict[str, Any], log: Path, ready: Connection) -> None:
    """One life, in a process that was made for it.

    Args:
        settings: of :class:`Trainee`.
        log: what the process says is appended to it.
        ready: told once signals are taken.
    """
    with log.open("ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    torch.set_num_threads(1)
    trainee = Trainee(**settings)
    trainee.listen()
    ready.send_bytes(b"ready")
    ready.close()
    trainee.run()
