"""Two ranks and a real service."""

from __future__ import annotations

import pytest

from distributed_ranks import run_ranks
from distributed_service import ADDRESS, SCENARIOS
from service_process import ServiceProcess


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    with ServiceProcess() as service:
        folder = tmp_path_factory.mktemp("service")
        return run_ranks("distributed_service", 2, folder, **{ADDRESS: service.address})


@pytest.mark.timeout(180)
@pytest.mark.parametrize("scenario", [scenario.__name__ for scenario in SCENARIOS])
def test_two_ranks(outcome, scenario):
    outcome.require(scenario)
