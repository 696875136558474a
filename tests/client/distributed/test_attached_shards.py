"""A preconditioner attached to AdamW under ``fully_shard``: blocks of shards, and their checkpoints."""

from __future__ import annotations

import pytest

from distributed_attached_shards import ON_FOUR_RANKS, ON_TWO_RANKS
from distributed_ranks import run_ranks

MODULE = "distributed_attached_shards"
TWO = [scenario.__name__ for scenario in ON_TWO_RANKS]
FOUR = [scenario.__name__ for scenario in ON_FOUR_RANKS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("shards")


@pytest.fixture(scope="module")
def two(folder):
    return run_ranks(MODULE, 2, folder, *TWO)


@pytest.fixture(scope="module")
def four(folder, two):
    """Four ranks, some of whose scenarios read what two ranks have saved."""
    return run_ranks(MODULE, 4, folder, *FOUR)


@pytest.mark.timeout(150)
@pytest.mark.parametrize("scenario", TWO)
def test_two_ranks(two, scenario):
    two.require(scenario)


@pytest.mark.timeout(150)
@pytest.mark.parametrize("scenario", FOUR)
def test_four_ranks(four, scenario):
    four.require(scenario)
