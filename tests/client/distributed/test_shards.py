"""``fully_shard`` on meshes of one and two dimensions: blocks of shards, and their checkpoints."""

from __future__ import annotations

import pytest

from distributed_shards import ON_FOUR_RANKS, ON_TWO_RANKS

MODULE = "distributed_shards"
TWO = [scenario.__name__ for scenario in ON_TWO_RANKS]
FOUR = [scenario.__name__ for scenario in ON_FOUR_RANKS]


@pytest.mark.timeout(150)
@pytest.mark.parametrize("scenario", TWO)
def test_two_ranks(two, scenario):
    two.require(scenario)


@pytest.mark.timeout(150)
@pytest.mark.parametrize("scenario", FOUR)
def test_four_ranks(four, scenario):
    four.require(scenario)
