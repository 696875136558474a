"""K-FAC on two ranks: factors to their owners, updates to all."""

from __future__ import annotations

import pytest

from distributed_kfac import SCENARIOS
from distributed_ranks import run_ranks


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    return run_ranks("distributed_kfac", 2, tmp_path_factory.mktemp("kfac"), timeout=140)


@pytest.mark.timeout(150)
@pytest.mark.parametrize("scenario", [scenario.__name__ for scenario in SCENARIOS])
def test_two_ranks(outcome, scenario):
    outcome.require(scenario)
