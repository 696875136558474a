"""Plain parameters that all ranks hold: owners, shared updates, faults, and what is refused."""

from __future__ import annotations

import pytest

from distributed_ranks import run_ranks
from distributed_replicas import SCENARIOS


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def outcome(request, tmp_path_factory):
    return run_ranks("distributed_replicas", request.param, tmp_path_factory.mktemp("replicas"), timeout=140)


@pytest.mark.timeout(150)
@pytest.mark.parametrize("scenario", [scenario.__name__ for scenario in SCENARIOS])
def test_replicas(outcome, scenario):
    outcome.require(scenario)
