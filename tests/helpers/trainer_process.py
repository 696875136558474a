"""A small real training in a process of its own, wherever that runs; it says after every step how it goes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SHOWN = (
    "versions_adopted",
    "waits",
    "age",
    "age_max",
    "connected",
    "connections",
    "nacks",
    "dropped",
    "received",
    "snapshots_sent",
    "snapshots_replaced",
    "epoch",
    "step",
)


@dataclass
class Step:
    """What the trainer said after a step; ``at`` is when it was read."""

    at: float
    seconds: float
    metrics: dict[str, Any]


class TrainerProcess:
    """Trains until it is closed.

    Args:
        address: of the service.
        prefix: stands before its command.
        environment: more variables.
        connection: more of ``ServiceConfig``.
        checkpoint: file to resume from if it is there, and to save to after every 20 steps.
        seed: of weights and data.
        staleness: of ``StalenessConfig``.
    """

    def __init__(
        self,
        address: str,
        prefix: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        connection: Mapping[str, Any] | None = None,
        checkpoint: str | None = None,
        seed: int = 0,
        **staleness: Any,
    ) -> None:
        settings = {
            "address": address,
            "connection": dict(connection or {}),
            "checkpoint": checkpoint,
            "seed": seed,
            **staleness,
        }
        path = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-u", __file__, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), **(environment or {})},
        )
        self.steps: list[Step] = []
        self.errors: list[str] = []
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=target, daemon=True) for target in (self._read, self._read_errors)
        ]
        for thread in self._threads:
            thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            entry = json.loads(line)
            with self._changed:
                self.steps.append(Step(time.monotonic(), entry.pop("seconds"), entry))
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.errors.append(line.rstrip())

    @property
    def metrics(self) -> dict[str, Any]:
        """After the latest step."""
        return self.steps[-1].metrics if self.steps else dict.fromkeys(_SHOWN, 0)

    def until(self, condition: Any, timeout: float = 90.0, what: str = "the condition") -> list[Step]:
        """Wait for a condition of this trainer; the steps meanwhile."""
        first, deadline = len(self.steps), time.monotonic() + timeout
        with self._changed:
            while not condition():
                assert self.process.poll() is None, "the trainer ended:\n" + "\n".join(self.errors[-30:])
                left = deadline - time.monotonic()
                assert left > 0, f"{what} did not come true within {timeout} s: {self.metrics}"
                self._changed.wait(min(left, 0.2))
        return self.steps[first:]

    def until_adopted(self, more: int, timeout: float = 90.0) -> list[Step]:
        """Wait for ``more`` adopted versions."""
        goal = self.metrics["versions_adopted"] + more
        return self.until(
            lambda: self.metrics["versions_adopted"] >= goal, timeout, f"{more} more versions adopted"
        )

    def for_seconds(self, seconds: float) -> list[Step]:
        """Let it train; the steps meanwhile."""
        end = time.monotonic() + seconds
        return self.until(lambda: time.monotonic() >= end, seconds + 60)

    def close(self) -> int:
        """End it in order; the exit status."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            return self.process.wait(40)
        finally:
            self.process.kill()
            self.process.wait(10)
            for thread in self._threads:
                thread.join(10)
            for pipe in (self.process.stdout, self.process.stderr):
                assert pipe is not None
                pipe.close()

    def __enter__(self) -> TrainerProcess:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def main(settings: dict[str, Any]) -> None:
    """Train until standard input ends."""
    # Here alone, so that a test may import the handle without torch.
    from small_training import Training

    ended = threading.Event()

    def listen() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=listen, daemon=True).start()
    checkpoint = settings.pop("checkpoint")
    training = Training(settings.pop("address"), **settings)
    if checkpoint is not None:
        training.resume(checkpoint)
    while not ended.is_set():
        training.step()
        if checkpoint is not None and training.optimizer.metrics()["step"] % 20 == 0:
            training.save(checkpoint)
        metrics = training.optimizer.metrics()
        print(json.dumps({"seconds": training.seconds[-1]} | {name: metrics[name] for name in _SHOWN}))
    training.optimizer.close()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
