"""Every behaviour of a training loop with a real service: gRPC, Ray and float64 roots elsewhere.

Adoption is on a schedule, so that a run whose roots are computed in process takes the very same steps, up to
the rounding of the roots to float32; a third one, with roots that are the identity, shows that the comparison
would see it if the service's did not count.
"""

from __future__ import annotations

import pytest
import torch

from loop_cases import ATTACHED_ALONE, CASES, SHAMPOO_ALONE
from preconditioner_client import LocalExchange, ServiceConfig
from preconditioner_client.exchange import Arrival
from service_process import TOKEN, ServiceProcess

RUNS = [
    pytest.param(case, attached, id=f"{case.__name__}-{'attached' if attached else 'shampoo'}")
    for case in CASES
    for attached in (False, True)
    if case not in (SHAMPOO_ALONE if attached else ATTACHED_ALONE)
]


@pytest.fixture(scope="module")
def service():
    with ServiceProcess() as running:
        yield running


class Identities(LocalExchange):
    """In the place of roots."""

    def _compute(self, snapshot):
        return Arrival(
            snapshot.block,
            snapshot.step,
            tuple(torch.eye(n) for n in self._session.blocks[snapshot.block].sides),
        )


def difference(run, other):
    """The greatest of all weights, relative to how large those of its tensor are."""
    pairs = [(a, other[name]) for name, a in run.items() if a.numel()]
    return max(float((a - b).abs().max().float() / b.abs().max().float()) for a, b in pairs)


@pytest.mark.parametrize(("case", "attached"), RUNS)
def test_trains_as_with_roots_in_process(service, case, attached):
    name = f"{case.__name__}-{'attached' if attached else 'shampoo'}"
    through_service, in_process, without = (case(attached) for _ in range(3))
    metrics = through_service.run(ServiceConfig(address=service.address, token=TOKEN), job=name)
    expected = in_process.run(LocalExchange(3))
    without.run(Identities(3))

    for counter in ("versions_adopted", "blocks", "blocks_with_version", "step", "age_max"):
        assert metrics[counter] == expected[counter], counter
    assert metrics["versions_adopted"] > metrics["blocks"] > 0
    for counter in ("refused", "nacks", "late_adoptions", "wait_timeouts", "dropped", "nonfinite_steps"):
        assert metrics[counter] == 0, counter

    found = difference(through_service.weights(), in_process.weights())
    assert found <= case.rounding
    assert difference(through_service.weights(), without.weights()) > max(10 * found, case.rounding)
