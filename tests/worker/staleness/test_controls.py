"""The exchanges of the controls do what their names say, and nothing else."""

from __future__ import annotations

import torch
from torch import nn

from preconditioner_client import LocalExchange, Shampoo, StalenessConfig, StalePolicy
from preconditioner_client.config import Ridge
from preconditioner_client.exchange import Arrival, BlockSpec, SessionSpec, Snapshot
from preconditioner_worker.staleness.controls import (
    FirstOnlyExchange,
    LateExchange,
    NothingExchange,
    RotatedExchange,
)

SESSION = SessionSpec("job", 1, (BlockSpec("w", (3,), (2.0,), Ridge()),))


def arrivals(exchange: LocalExchange, steps: int = 6) -> list[Arrival]:
    """What comes of a snapshot of other statistics in every step."""
    exchange.open(SESSION)
    found: list[Arrival] = []
    for step in range(1, steps + 1):
        side = torch.tensor([1.0, 0.1, 0.2, 2.0, 0.3, 3.0]) * step
        exchange.offer([Snapshot(0, step, (side,))], step)
        found += [event for event in exchange.collect(step) if isinstance(event, Arrival)]
    return found


def test_each_answers_what_it_should() -> None:
    assert [a.step for a in arrivals(NothingExchange())] == []
    assert [a.step for a in arrivals(FirstOnlyExchange(delay=1))] == [1]
    assert [a.step for a in arrivals(LateExchange(4))] == [4, 5, 6]
    assert [a.step for a in arrivals(RotatedExchange(0))] == [1, 2, 3, 4, 5, 6]


def test_random_directions_keep_the_spectrum_and_stay_the_same() -> None:
    right, turned, again = (arrivals(e) for e in (LocalExchange(), RotatedExchange(7), RotatedExchange(7)))
    for a, b, c in zip(right, turned, again, strict=True):
        assert torch.equal(b.sides[0], c.sides[0])
        assert torch.equal(b.sides[0], b.sides[0].T)
        torch.testing.assert_close(torch.linalg.eigvalsh(a.sides[0]), torch.linalg.eigvalsh(b.sides[0]))
        assert not torch.allclose(a.sides[0], b.sides[0], rtol=0.05)
    # Statistics that only grow keep their eigenvectors: so must the rotated roots.
    torch.testing.assert_close(turned[0].sides[0] / turned[3].sides[0], torch.full((3, 3), 2.0))
    assert not torch.allclose(arrivals(RotatedExchange(8))[0].sides[0], turned[0].sides[0])


def test_a_frozen_preconditioner_is_never_replaced() -> None:
    layer = nn.Linear(3, 2, bias=False)
    staleness = StalenessConfig(refresh_every=1, max_staleness=99, policy=StalePolicy.KEEP, stagger=False)
    optimizer = Shampoo(layer.named_parameters(), lr=0.1, staleness=staleness, service=FirstOnlyExchange(1))
    generator = torch.Generator().manual_seed(3)
    held = []
    for _ in range(5):
        layer.weight.grad = torch.randn(2, 3, generator=generator)
        optimizer.step()
        (state,) = optimizer.state_dict()["state"].values()
        held.append(next(value.clone() for key, value in state.items() if ".preconditioner." in key))
    assert optimizer.metrics()["versions_adopted"] == 1
    assert optimizer.metrics()["age"] == 4
    assert all(torch.equal(held[1], later) for later in held[1:])
