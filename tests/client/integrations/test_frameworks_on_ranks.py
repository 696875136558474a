"""Hugging Face's ``Trainer``, Lightning and Accelerate on two ranks resume bit for bit."""

from __future__ import annotations

import pytest

from distributed_ranks import run_ranks

# Not from their module, whose frameworks take seconds to import in every process that collects tests.
SCENARIOS = [
    "the_hugging_face_trainer_resumes_bit_for_bit",
    "lightning_resumes_bit_for_bit",
    "accelerate_resumes_bit_for_bit",
    "callbacks_leave_to_torch_what_is_sharded",
]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run_ranks("distributed_frameworks", 2, tmp_path_factory.mktemp("two"), *SCENARIOS)


@pytest.mark.timeout(150)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_two_ranks(two, scenario):
    two.require(scenario)
