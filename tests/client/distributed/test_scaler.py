"""``torch.amp.GradScaler`` on several ranks: infinity in one rank's batch."""

from __future__ import annotations

import pytest

from distributed_ranks import run_ranks
from distributed_scaler import ON_FOUR_RANKS, SCENARIOS

MODULE = "distributed_scaler"
FOUR = [scenario.__name__ for scenario in ON_FOUR_RANKS]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run_ranks(MODULE, 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return run_ranks(MODULE, 4, tmp_path_factory.mktemp("four"), *FOUR)


@pytest.mark.timeout(150)
@pytest.mark.parametrize("scenario", [scenario.__name__ for scenario in SCENARIOS])
def test_two_ranks(two, scenario):
    two.require(scenario)


@pytest.mark.timeout(150)
@pytest.mark.parametrize("scenario", FOUR)
def test_four_ranks(four, scenario):
    four.require(scenario)
