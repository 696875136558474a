"""Checkpoints of replicas: by rank, in one file, with torch.distributed.checkpoint; other world sizes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from distributed_checkpoints import (
    SCENARIOS,
    an_attached_preconditioner_resumes_from_what_two_ranks_saved_with_torch,
    assert_continues_as_uninterrupted,
    resume,
)
from distributed_training import make_model, make_optimizer

MODULE = "distributed_checkpoints"
TWO = [scenario.__name__ for scenario in SCENARIOS]
FOUR = [
    "all_ranks_resume_from_one_file",
    "load_with_torch",
    "an_attached_preconditioner_resumes_from_what_two_ranks_saved_with_torch",
]


@pytest.mark.timeout(150)
@pytest.mark.parametrize("scenario", TWO)
def test_two_ranks(two, scenario):
    two.require(scenario)


@pytest.mark.timeout(150)
@pytest.mark.parametrize("scenario", FOUR)
def test_four_ranks_resume_from_two(four, scenario):
    four.require(scenario)


def test_one_process_resumes_from_the_file_of_two_ranks(two, folder):
    two.require("a_consolidated_state_is_that_of_one_process")
    assert_continues_as_uninterrupted(*resume(torch.load(folder / "whole.pt", weights_only=True)))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_one_process_resumes_from_what_two_ranks_saved_with_torch(two, folder):
    two.require("save_with_torch")
    model = make_model()
    optimizer = make_optimizer(model)
    state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=folder / "nested")
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    assert_continues_as_uninterrupted(model, optimizer)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_one_process_resumes_from_what_two_ranks_saved_with_torch_of_an_attached_preconditioner(two, folder):
    two.require("an_attached_preconditioner_is_saved_by_torch_beside_its_optimizer")
    an_attached_preconditioner_resumes_from_what_two_ranks_saved_with_torch(folder)
