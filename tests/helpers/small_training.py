"""A small real training run beside a real service."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import nn

from preconditioner_client import BlockingConfig, ServiceConfig, Shampoo, StalenessConfig
from service_process import TOKEN, wait_for


class Training:
    """A small real model; every step, forward and backward included, is timed.

    Args:
        address: of the service.
        connection: more of ``ServiceConfig``.
        seed: of weights and data.
        staleness: of ``StalenessConfig``.
    """

    def __init__(self, address, connection=None, seed=0, **staleness):
        torch.manual_seed(seed)
        self.model = nn.Sequential(
            nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 8)
        )
        self.x, self.y = torch.randn(8192, 64), torch.randn(8192, 8)
        self.optimizer = Shampoo(
            self.model.named_parameters(),
            lr=1e-3,
            blocking=BlockingConfig(block_size=128),
            staleness=StalenessConfig(**{"max_staleness": 100_000, **staleness}),
            service=ServiceConfig(address=address, token=TOKEN, **(connection or {})),
        )
        self.seconds = []

    def step(self):
        began = time.perf_counter()
        self.optimizer.zero_grad()
        nn.functional.mse_loss(self.model(self.x), self.y).backward()
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - began)

    def save(self, path):
        """Whole, or not at all."""
        part = Path(f"{path}.part")
        torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, part)
        part.replace(path)

    def resume(self, path):
        """From what was saved there, if anything was."""
        if Path(path).exists():
            state = torch.load(path, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])

    def adopted(self):
        return self.optimizer.metrics()["versions_adopted"]

    def until(self, condition, timeout=90.0, what="the condition"):
        """Train until the condition holds; returns the durations of these steps."""
        first = len(self.seconds)

        def stepped():
            self.step()
            return condition()

        wait_for(stepped, timeout, what)
        return self.seconds[first:]

    def until_adopted(self, more):
        goal = self.adopted() + more
        return self.until(lambda: self.adopted() >= goal, what=f"{more} more versions")

    def until_fresh(self):
        """Until every block has a version from after now."""
        now = self.optimizer.metrics()["step"]

        def fresh():
            metrics = self.optimizer.metrics()
            return metrics["age"] is not None and metrics["step"] - metrics["age"] > now

        return self.until(fresh, what="a newer version of every block")

    def for_seconds(self, seconds):
        end = time.monotonic() + seconds
        return self.until(lambda: time.monotonic() >= end, timeout=seconds + 60)
