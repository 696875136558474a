"""What a step costs on GPT-2 small or a scaled one: of the optimizer alone, or the whole training step."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from rich.table import Table
from torch.optim import Optimizer
from torch.profiler import profile

from preconditioner_client import (
    Arrival,
    BlockingConfig,
    Exchange,
    GraftingConfig,
    LocalExchange,
    Rejection,
    SessionSpec,
    Shampoo,
    Snapshot,
    StalenessConfig,
)
from preconditioner_worker.gpt2 import GPT2
from preconditioner_worker.results import write_text
from preconditioner_worker.step_timing import StepTimer, launches_of

ASYNCHRONOUS = "Shampoo, asynchronous"


class StepCost(BaseModel):
    """Of one contender.

    Attributes:
        name: which.
        median_ms: of a step.
        p99_ms: of a step.
        launches: operators of an ``optimizer.step()`` that do work, a foreach operator counted once; the mean
            over a refresh interval.
        versions_adopted: preconditioners that were taken into use in the steps that were timed.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    median_ms: float
    p99_ms: float
    launches: int
    versions_adopted: int


class StepBenchmark(BaseModel):
    """The result as JSON.

    Attributes:
        batch_size: sequences of a training step; None if ``optimizer.step()`` alone was timed.
    """

    model_config = ConfigDict(extra="forbid")

    machine: str
    torch: str
    threads: int
    scale: float
    layers: int
    parameters: int
    batch_size: int | None
    steps: int
    block_size: int
    refresh_every: int
    costs: list[StepCost]


class FrozenExchange:
    """Answers the first snapshot of every block with the identity, and nothing after it."""

    def __init__(self) -> None:
        self._answers: list[Arrival | Rejection] = []
        self._answered: set[int] = set()
        self._session: SessionSpec | None = None
        self.generation = 0

    def open(self, session: SessionSpec) -> None:
        """See ``Exchange``."""
        self._session = session
        self.generation += 1

    def offer(self, snapshots: Sequence[Snapshot], step: int) -> None:
        """See ``Exchange``."""
        assert self._session is not None
        for snapshot in snapshots:
            if snapshot.block not in self._answered:
                self._answered.add(snapshot.block)
                sides = tuple(torch.eye(n) for n in self._session.blocks[snapshot.block].sides)
                self._answers.append(Arrival(snapshot.block, snapshot.step, sides))

    def collect(self, step: int) -> list[Arrival | Rejection]:
        """See ``Exchange``."""
        answers, self._answers = self._answers, []
        return answers

    def wait(self, timeout: float) -> bool:
        """See ``Exchange``."""
        return False

    def counters(self) -> dict[str, int]:
        """See ``Exchange``."""
        return {"connected": 1}

    def close(self) -> None:
        """See ``Exchange``."""


def measure(
    name: str,
    build: Callable[[GPT2], Optimizer],
    model: GPT2,
    *,
    batch_size: int | None,
    steps: int,
    interval: int,
    profile_file: Path | None = None,
) -> StepCost:
    """Time ``steps`` steps, after three intervals and until every block has a preconditioner.

    Args:
        name: of the contender.
        build: makes its optimizer.
        model: with parameters that no other contender has changed.
        batch_size: as for :class:`StepTimer`.
        steps: that are timed.
        interval: steps between snapshots of a block.
        profile_file: where to write which operators take the time of some more steps.
    """
    timer = StepTimer(build, model, batch_size)
    try:
        timer.warm_up(3 * interval)
        before = timer.versions_adopted()
        times = timer.times(steps)
        adopted = timer.versions_adopted() - before
        launches = np.mean([launches_of(timer.optimizer) for _ in range(interval)])
        if profile_file is not None:
            with profile() as recorded:
                timer.times(10)
            busiest = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
            write_text(profile_file, recorded.key_averages().table(sort_by=busiest, row_limit=-1) + "\n")
    finally:
        timer.close()
    median, p99 = np.percentile(np.asarray(times), [50, 99])
    return StepCost(
        name=name,
        median_ms=round(float(median), 3),
        p99_ms=round(float(p99), 3),
        launches=round(float(launches)),
        versions_adopted=adopted,
    )


def benchmark(
    *,
    scale: float,
    layers: int,
    batch_size: int | None,
    steps: int,
    block_size: int,
    refresh_every: int,
    device: str,
    service: str | Exchange,
    profile_file: Path | None = None,
) -> StepBenchmark:
    """Run all contenders one after the other, at equal hyperparameters.

    Args:
        scale: of the model, see :class:`GPT2`.
        layers: of the model.
        batch_size: as for :class:`StepTimer`.
        steps: that are timed.
        block_size: largest side of a block.
        refresh_every: steps between snapshots of a block.
        device: of the parameters.
        service: of the asynchronous contender, as for ``Shampoo``.
        profile_file: where to write which operators take the time of the asynchronous contender.

    Raises:
        TimeoutError: the service computes too slowly to begin.
    """

    def shampoo(exchange: str | Exchange) -> Callable[[GPT2], Optimizer]:
        return lambda model: Shampoo(
            model.named_parameters(),
            lr=1e-3,
            weight_decay=0.1,
            grafting=GraftingConfig(beta2=0.99),
            blocking=BlockingConfig(block_size=block_size, max_side=8 * block_size),
            staleness=StalenessConfig(max_staleness=1_000_000, refresh_every=refresh_every, policy="keep"),
            service=exchange,
        )

    contenders: dict[str, Callable[[GPT2], Optimizer]] = {
        "AdamW (foreach)": lambda model: torch.optim.AdamW(
            model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, foreach=True
        ),
        "Shampoo, frozen": shampoo(FrozenExchange()),
        ASYNCHRONOUS: shampoo(service),
        "Shampoo, synchronous": shampoo(LocalExchange(0)),
    }
    place = torch.device(device)
    costs = []
    for name, build in contenders.items():
        torch.manual_seed(0)
        model = GPT2(scale, layers).to(place)
        cost = measure(
            name,
            build,
            model,
            batch_size=batch_size,
            steps=steps,
            interval=refresh_every,
            profile_file=profile_file if name == ASYNCHRONOUS else None,
        )
        costs.append(cost)
    return StepBenchmark(
        machine=torch.cuda.get_device_name(place) if place.type == "cuda" else platform.processor() or "CPU",
        torch=str(torch.__version__),
        threads=torch.get_num_threads(),
        scale=scale,
        layers=layers,
        parameters=sum(p.numel() for p in model.parameters()),
        batch_size=batch_size,
        steps=steps,
        block_size=block_size,
        refresh_every=refresh_every,
        costs=costs,
    )


def table(result: StepBenchmark) -> Table:
    """For people; ratios are to AdamW."""
    whole = f"training step, batches of {result.batch_size} sequences"
    what = "optimizer.step()" if result.batch_size is None else whole
    shown = Table(title=f"{what}, {result.parameters / 1e6:.1f} M parameters, milliseconds")
    for column in ("", "median", "ratio", "p99", "ratio", "launches", "adopted"):
        shown.add_column(column, justify="left" if not column else "right")
    first = result.costs[0]
    for cost in result.costs:
        shown.add_row(
            cost.name,
            f"{cost.median_ms:.2f}",
            f"{cost.median_ms / first.median_ms:.2f}",
            f"{cost.p99_ms:.2f}",
            f"{cost.p99_ms / first.p99_ms:.2f}",
            str(cost.launches),
            str(cost.versions_adopted),
        )
    return shown


def save(result: StepBenchmark, path: Path) -> None:
    """Write the result as JSON.

    Raises:
        ResultError: it cannot be written.
    """
    write_text(path, result.model_dump_json(indent=1) + "\n")
