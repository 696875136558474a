"""One process, two ranks and four, and one real service that they share."""

from __future__ import annotations

import pytest

from distributed_service import ON_FOUR_RANKS, ON_TWO_RANKS
from distributed_service_runs import (
    a_run_resumes_from_one_file,
    a_run_resumes_from_the_parts_of_two_ranks,
    a_stopped_run_resumes_bit_for_bit,
    train_alone,
)
from given_service import ADDRESS
from service_process import ServiceProcess

MODULE = "distributed_service"
TWO = [scenario.__name__ for scenario in ON_TWO_RANKS]
FOUR = [scenario.__name__ for scenario in ON_FOUR_RANKS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """In which every process finds what those before have left."""
    folder = tmp_path_factory.mktemp("service")
    with ServiceProcess() as service, pytest.MonkeyPatch.context() as patch:
        patch.setenv(ADDRESS, service.address)
        train_alone(folder)
        yield folder


@pytest.mark.timeout(180)
@pytest.mark.parametrize("scenario", TWO)
def test_two_ranks(two, scenario):
    two.require(scenario)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("scenario", FOUR)
def test_four_ranks(four, scenario):
    four.require(scenario)


def test_one_process_resumes_from_the_file_of_two_ranks(two, folder):
    two.require(a_stopped_run_resumes_bit_for_bit.__name__)
    a_run_resumes_from_one_file(folder)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_one_process_resumes_from_what_two_ranks_saved_with_torch(two, folder):
    two.require(a_stopped_run_resumes_bit_for_bit.__name__)
    a_run_resumes_from_the_parts_of_two_ranks(folder)
