"""What a step of the optimizer alone costs, for parameters shaped as those of GPT-2 small."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from rich.table import Table
from torch import nn
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile

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
    StalePolicy,
)

LAYERS, WIDTH, VOCABULARY, CONTEXT = 12, 768, 50257, 1024

# Operators that only describe memory anew: nothing is launched for them.
VIEWS = frozenset(
    f"aten::{name}"
    for name in (
        "view", "reshape", "_reshape_alias", "slice", "select", "as_strided", "unbind", "movedim", "permute",
        "flatten", "transpose", "t", "mT", "detach", "expand", "unsqueeze", "squeeze", "alias", "view_as",
        "lift_fresh", "empty", "empty_like", "empty_strided", "resolve_conj", "resolve_neg", "item",
        "_local_scalar_dense", "is_nonzero", "broadcast_tensors",
    )
)  # fmt: skip


class StepCost(BaseModel):
    """Of one contender.

    Attributes:
        name: which.
        median_ms: of ``optimizer.step()``.
        p99_ms: of ``optimizer.step()``.
        launches: operators of one step that do work, a foreach operator counted once.
        versions_adopted: preconditioners that arrived meanwhile.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    median_ms: float
    p99_ms: float
    launches: int
    versions_adopted: int


class StepBenchmark(BaseModel):
    """The result as JSON."""

    model_config = ConfigDict(extra="forbid")

    machine: str
    torch: str
    threads: int
    scale: float
    layers: int
    parameters: int
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


def gpt2_parameters(scale: float, layers: int, device: torch.device) -> list[nn.Parameter]:
    """GPT-2 small's parameters with width, vocabulary and context times ``scale``, random."""
    width, vocabulary = max(8, round(WIDTH * scale)), max(8, round(VOCABULARY * scale))
    shapes: list[tuple[int, ...]] = [(vocabulary, width), (max(8, round(CONTEXT * scale)), width)]
    for _ in range(layers):
        shapes += [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)]
        shapes += [(width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    shapes += [(width,), (width,)]
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter((0.02 * torch.randn(shape, generator=generator)).to(device)) for shape in shapes]


def launches_of(optimizer: Optimizer) -> int:
    """Operators of one step that do work, a foreach operator counted once whatever it is made of."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        optimizer.step()
    return sum(
        event.name.startswith("aten::")
        and event.name not in VIEWS
        # A conversion to what a tensor is already does nothing.
        and (event.name != "aten::to" or bool(event.cpu_children))
        and not (event.cpu_parent is not None and event.cpu_parent.name.startswith("aten::"))
        for event in recorded.events()
    )


def measure(
    name: str,
    build: Callable[[list[nn.Parameter]], Optimizer],
    parameters: list[nn.Parameter],
    steps: int,
    warm_up: int,
) -> StepCost:
    """Time ``steps`` steps after ``warm_up`` others, with new gradients every step."""
    optimizer = build(parameters)
    device = parameters[0].device
    generator = torch.Generator(device=device).manual_seed(1)
    seconds = []
    try:
        for step in range(warm_up + steps):
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter).normal_(generator=generator)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            began = time.perf_counter()
            optimizer.step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if step >= warm_up:
                seconds.append(time.perf_counter() - began)
        launches = launches_of(optimizer)
        adopted = optimizer.metrics()["versions_adopted"] if isinstance(optimizer, Shampoo) else 0
    finally:
        if isinstance(optimizer, Shampoo):
            optimizer.close()
    median, p99 = np.percentile(np.asarray(seconds) * 1e3, [50, 99])
    return StepCost(
        name=name,
        median_ms=round(float(median), 3),
        p99_ms=round(float(p99), 3),
        launches=launches,
        versions_adopted=adopted,
    )


def benchmark(
    *, scale: float, layers: int, steps: int, block_size: int, refresh_every: int, device: str, service: str
) -> StepBenchmark:
    """Run all contenders one after the other, at equal hyperparameters.

    Args:
        scale: of width, vocabulary and context.
        layers: of the model.
        steps: that are timed.
        block_size: largest side of a block.
        refresh_every: steps between snapshots of a block.
        device: of the parameters.
        service: of the asynchronous contender, ``embedded`` or ``host:port``.
    """

    def shampoo(exchange: str | Exchange) -> Callable[[list[nn.Parameter]], Optimizer]:
        return lambda params: Shampoo(
            params,
            lr=1e-3,
            weight_decay=0.1,
            grafting=GraftingConfig(beta2=0.99),
            blocking=BlockingConfig(block_size=block_size, max_side=8 * block_size),
            staleness=StalenessConfig(
                max_staleness=1_000_000, refresh_every=refresh_every, policy=StalePolicy.KEEP
            ),
            service=exchange,
        )

    contenders: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
        "AdamW (foreach)": lambda params: torch.optim.AdamW(
            params, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, foreach=True
        ),
        "Shampoo, frozen": shampoo(FrozenExchange()),
        "Shampoo, asynchronous": shampoo(service),
        "Shampoo, synchronous": shampoo(LocalExchange(0)),
    }
    place = torch.device(device)
    warm_up = 3 * refresh_every
    costs = [
        measure(name, build, gpt2_parameters(scale, layers, place), steps, warm_up)
        for name, build in contenders.items()
    ]
    return StepBenchmark(
        machine=torch.cuda.get_device_name(place) if place.type == "cuda" else platform.processor() or "CPU",
        torch=str(torch.__version__),
        threads=torch.get_num_threads(),
        scale=scale,
        layers=layers,
        parameters=sum(p.numel() for p in gpt2_parameters(scale, layers, torch.device("cpu"))),
        steps=steps,
        block_size=block_size,
        refresh_every=refresh_every,
        costs=costs,
    )


def table(result: StepBenchmark) -> Table:
    """For people; ratios are to AdamW."""
    shown = Table(title=f"optimizer.step(), {result.parameters / 1e6:.1f} M parameters, milliseconds")
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
    """Write the result as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(result.model_dump_json(indent=1) + "\n")
