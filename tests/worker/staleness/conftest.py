"""Runs to judge, without training."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from preconditioner_worker.staleness import RunSpec, StudyRun, StudySettings
from preconditioner_worker.staleness.fingerprint import Fingerprint
from preconditioner_worker.staleness.results import Drift

SETTINGS = StudySettings(steps=100, evaluate_every=10)


@pytest.fixture
def make_run() -> Callable[..., StudyRun]:
    def make(spec: RunSpec, losses: Sequence[float], **changes: object) -> StudyRun:
        """``losses`` held out: before the first step, and then every ten of a hundred."""
        aged = spec.arm is not None
        ages = [age for step in range(1, 101) if aged and (age := spec.arm.age(step)) is not None]
        return StudyRun(
            spec=spec,
            lr=0.1,
            fingerprint=Fingerprint.here(SETTINGS),
            steps=100,
            loss_digest="0" * 16,
            train_loss=list(losses[1:]),
            held_out_loss=list(losses),
            diverged=losses[-1] != losses[-1],
            ages={age: ages.count(age) for age in sorted(set(ages))},
            ages_as_planned=True if aged else None,
            drift=[Drift(step=90, age=ages[-1], median=0.1, largest=0.2)] if ages else [],
            versions_adopted=1,
            refused=0,
            waits=0,
            parameters=10,
            blocks=4,
            metric="held-out loss (nats per byte)",
            seconds=1.0,
        ).model_copy(update=changes)

    return make


@pytest.fixture
def study_runs(make_run: Callable[..., StudyRun]) -> list[StudyRun]:
    """A valid study of three seeds: A(10) holds, A(20) fails, both negative controls fail."""
    runs = []
    for seed in range(3):
        noise = 1e-4 * seed

        def add(end: float, noise: float = noise, seed: int = seed, **spec: object) -> None:
            losses = [5.0 - (5.0 - end) * i / 10 + noise for i in range(11)]
            runs.append(make_run(RunSpec(seed=seed, **spec), losses))

        shampoo = {"statistics": "sum", "grafting": True}
        add(1.0, method="A", n=1, **shampoo)
        add(1.001 + noise, method="A", n=10, **shampoo)
        add(1.1 + noise, method="A", n=20, **shampoo)
        add(1.5 + noise, method="diagonal", grafting=True)
        add(1.6, method="frozen", n=1, **shampoo)
        add(1.7, method="random", n=100, **shampoo)
        add(1.05, method="late", n=20, **shampoo)
        add(1.3, method="adamw")
        add(1.4, method="adagrad")
    return runs
