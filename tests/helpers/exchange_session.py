"""Sessions, snapshots and waiting, for tests of exchanges."""

from __future__ import annotations

import time

import torch

from fake_front import until
from preconditioner_client.config import Ridge, RidgeKind
from preconditioner_client.exchange import Arrival, BlockSpec, Exchange, Rejection, SessionSpec, Snapshot

RIDGE = Ridge(kind=RidgeKind.ABSOLUTE, value=0.1)


def session(*sides: tuple[int, ...], epoch: int = 1, in_flight: int = 1, job: str = "test") -> SessionSpec:
    blocks = tuple(
        BlockSpec(f"block{i}", lengths, (2.0 * len(lengths),) * len(lengths), RIDGE)
        for i, lengths in enumerate(sides or [(3, 5), (4,)])
    )
    return SessionSpec(job=job, epoch=epoch, blocks=blocks, snapshots_in_flight=in_flight, max_staleness=50)


def snapshot(spec: SessionSpec, block: int, step: int, ready: object = None) -> Snapshot:
    generator = torch.Generator().manual_seed(1000 * block + step)
    sides = []
    for n in spec.blocks[block].sides:
        factor = torch.randn(n, n, generator=generator)
        sides.append((factor @ factor.T)[tuple(torch.triu_indices(n, n))])
    return Snapshot(block, step, tuple(sides), ready)


def collect(exchange: Exchange, count: int, timeout: float = 15.0) -> list[Arrival | Rejection]:
    items: list[Arrival | Rejection] = []
    deadline = time.monotonic() + timeout
    while len(items) < count:
        items += exchange.collect(0)
        if len(items) < count:
            assert exchange.wait(deadline - time.monotonic()), f"only {items} within {timeout} s"
    return items


def opened(exchange: Exchange, spec: SessionSpec) -> SessionSpec:
    before = exchange.generation
    exchange.open(spec)
    until(lambda: exchange.generation > before, what="attached")
    return spec
