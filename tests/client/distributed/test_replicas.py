"""Plain parameters that all ranks hold: owners, shared updates, faults, and what is refused."""

from __future__ import annotations

import pytest

from distributed_replicas import ON_FOUR_RANKS, SCENARIOS

MODULE = "distributed_replicas"
TWO = [scenario.__name__ for scenario in SCENARIOS]
FOUR = [scenario.__name__ for scenario in ON_FOUR_RANKS]


@pytest.mark.timeout(150)
@pytest.mark.parametrize("scenario", TWO)
def test_two_ranks(two, scenario):
    two.require(scenario)


@pytest.mark.timeout(150)
@pytest.mark.parametrize("scenario", FOUR)
def test_four_ranks(four, scenario):
    four.require(scenario)
