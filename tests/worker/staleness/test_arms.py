"""Arithmetic of the arms, and that the client logs exactly these ages."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from preconditioner_client import LocalExchange, Shampoo
from preconditioner_worker.staleness import Arm, ArmKind

ARMS = [Arm(kind, n) for kind in ArmKind for n in (1, 3, 7, 10, 23)]


def ages_by_simulation(arm: Arm, steps: int) -> list[int | None]:
    """Snapshots taken and delivered one by one."""
    under_way: list[int] = []
    version: int | None = None
    ages = []
    for step in range(1, steps + 1):
        if step % arm.interval == 0:
            under_way.append(step)
        while under_way and under_way[0] + arm.delay <= step:
            version = under_way.pop(0)
        ages.append(None if version is None else step - version)
    return ages


@given(kind=st.sampled_from(ArmKind), n=st.integers(1, 60))
def test_ages_are_those_of_snapshots_delivered_one_by_one(kind: ArmKind, n: int) -> None:
    arm = Arm(kind, n)
    assert [arm.age(step) for step in range(1, 301)] == ages_by_simulation(arm, 300)


@pytest.mark.parametrize("n", [1, 10, 1200])
def test_published_ages_run_from_n_to_2n_exactly(n: int) -> None:
    arm = Arm(ArmKind.PUBLISHED, n)
    assert arm.age(2 * n - 1) is None
    assert [arm.age(step) for step in range(2 * n, 5 * n)] == 3 * list(range(n, 2 * n))
    assert arm.oldest == 2 * n - 1 == arm.staleness().max_staleness


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: f"{arm.kind.value}{arm.n}")
def test_the_client_logs_the_ages_of_the_arm(arm: Arm) -> None:
    layer = nn.Linear(3, 2, bias=False)
    optimizer = Shampoo(layer.named_parameters(), lr=0.1, staleness=arm.staleness(), service=LocalExchange())
    ages = []
    for _ in range(60):
        layer.weight.grad = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))
        optimizer.step()
        ages.append(optimizer.metrics()["age"])
    assert ages == [arm.age(step) for step in range(1, 61)]
    metrics = optimizer.metrics()
    assert metrics["waits"] == metrics["late_adoptions"] == metrics["blocks_grafted_stale"] == 0


def test_a_delay_of_no_step_is_refused() -> None:
    with pytest.raises(ValueError, match=r"N must be >= 1 step, not 0"):
        Arm(ArmKind.PUBLISHED, 0)
