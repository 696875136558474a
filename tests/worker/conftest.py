"""Results to compare and draw, without training."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from preconditioner_worker.contenders import CONTENDERS
from preconditioner_worker.results import (
    Environment,
    EvaluationPoint,
    RunResult,
    RunSettings,
    StepSeries,
)


@pytest.fixture
def make_run() -> Callable[..., RunResult]:
    def make(
        name: str,
        losses: Sequence[float],
        *,
        every: int = 10,
        seconds: float = 0.5,
        seed: int = 0,
        first_loss: float = 9.0,
    ) -> RunResult:
        steps = every * len(losses)
        aged = name == "shampoo"
        return RunResult(
            settings=RunSettings(
                label=name,
                workload="text",
                optimizer=CONTENDERS[name](),
                seed=seed,
                steps=steps,
                evaluate_every=every,
            ),
            metric="held-out loss (nats per byte)",
            parameters=10,
            steps=StepSeries(
                loss=[first_loss] + [2.0] * (steps - 1),
                seconds=[seconds] * steps,
                optimizer_seconds=[seconds / 10] * steps,
                age=[(i % 7 if i > 3 else None) if aged else None for i in range(steps)],
                versions=[i if aged else 0 for i in range(steps)],
            ),
            evaluations=[
                EvaluationPoint(step=every * i, seconds=seconds * every * i, loss=loss, accuracy=0.5)
                for i, loss in enumerate(losses, start=1)
            ],
            diverged=losses[-1] != losses[-1],
            service_seconds=0.0,
            metrics={"versions_adopted": 5, "blocks": 3, "age_max": 9, "waits": 0, "ages": [1, 2]}
            if aged
            else {},
            environment=Environment.here(),
        )

    return make
