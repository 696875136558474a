"""Hugging Face's ``Trainer``, Lightning and Accelerate on two ranks resume bit for bit."""

from __future__ import annotations

import pytest

MODULE = "distributed_frameworks"
# Not from their module, whose frameworks take seconds to import in every process that collects tests.
TWO = [
    "the_hugging_face_trainer_resumes_bit_for_bit",
    "lightning_resumes_bit_for_bit",
    "accelerate_resumes_bit_for_bit",
    "callbacks_leave_to_torch_what_is_sharded",
]


@pytest.mark.timeout(150)
@pytest.mark.parametrize("scenario", TWO)
def test_two_ranks(two, scenario):
    two.require(scenario)
