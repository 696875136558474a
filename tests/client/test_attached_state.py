"""Checkpoints of what is attached where groups differ, or are left alone."""

from __future__ import annotations

import io
import logging

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from distributed_training import assert_same
from preconditioner_client import (
    BlockingConfig,
    GraftingConfig,
    GroupConfig,
    LocalExchange,
    StalenessConfig,
    StatisticsConfig,
    attach,
)

SCHEDULED = StalenessConfig(refresh_every=3, adoption="scheduled", delay=4, max_staleness=20)
OWN = GroupConfig(
    grafting=GraftingConfig(method="adam"),
    statistics=StatisticsConfig(beta=0.9),
    blocking=BlockingConfig(block_size=4),
)
STOP, END = 9, 20


def attached(groups):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    layers = [{"params": list(model[i].parameters())} for i in (0, 2, 4)]
    optimizer = torch.optim.AdamW(layers, lr=0.01)
    handle = attach(optimizer, model, groups=groups, staleness=SCHEDULED, service=LocalExchange())
    return model, optimizer, handle


def train(model, optimizer, steps):
    for step in steps:
        x = torch.randn(32, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).sub(x[:, :3].roll(1, 1)).square().mean().backward()
        optimizer.step()


def trained(groups, steps):
    run = attached(groups)
    train(*run[:2], steps)
    return run


def through_a_file(model, optimizer):
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def resumed(groups, saved):
    model, optimizer, handle = attached(groups)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return model, optimizer, handle


def tensors(states):
    return [value for state in states for value in state.values() if torch.is_tensor(value)]


GROUPS = {0: OWN, 1: None}


def test_groups_that_differ_resume_bit_for_bit(caplog):
    whole, _, _ = trained(GROUPS, range(END))
    saved = through_a_file(*trained(GROUPS, range(STOP))[:2])
    model, optimizer, handle = resumed(GROUPS, saved)
    # Adam's moments and blocks of the first group, nothing of the second, and of the third blocks alone.
    keys = [{key.partition(".")[0] for key in state} for state in handle.state_dict()["state"]]
    assert keys == [
        {"step", "second_moment", "block"},
        {"step", "second_moment"},
        {"step"},
        {"step"},
        {"step", "block"},
        {"step"},
    ]
    train(model, optimizer, range(STOP, END))
    assert_same(model, whole)
    assert not caplog.records


def test_a_grafting_of_one_group_refuses_a_checkpoint_without_its_moment():
    saved = through_a_file(
        *trained({0: GroupConfig(grafting=GraftingConfig(method="lars"))}, range(STOP))[:2]
    )
    with pytest.raises(ValueError, match=r"0\.weight: the checkpoint lacks 'second_moment'"):
        resumed(GROUPS, saved)


def test_a_group_that_was_left_alone_begins_anew_and_the_others_go_on(caplog):
    saved = through_a_file(*trained({0: OWN, 1: None}, range(STOP))[:2])
    model, optimizer, handle = resumed({0: OWN, 1: OWN}, saved)
    assert [r.getMessage() for r in caplog.records] == [
        "parameter group 1 was left alone when the checkpoint was saved, and is not now: its preconditioner "
        "begins anew, while the other groups go on"
    ]
    metrics = handle.metrics()
    assert metrics["step"] == STOP
    # The first group's four blocks and the third's one; the second's four are without.
    assert (metrics["blocks"], metrics["blocks_with_version"]) == (9, 5)
    states = handle.state_dict()["state"]
    assert not any(tensor.any() for tensor in tensors(states[2:4]) if tensor.is_floating_point())
    assert any(tensor.any() for tensor in tensors(states[:2]))
    train(model, optimizer, range(STOP, END))
    assert handle.metrics()["blocks_with_version"] == 9
    assert [state.get("step") for state in handle.state_dict()["state"]] == [END] * 2 + [END - STOP] * 2 + [
        0
    ] * 2
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def test_it_is_not_counted_with_what_another_number_of_shards_lacks(caplog):
    saved = through_a_file(*trained({0: OWN, 1: None}, range(STOP))[:2])
    saved["optimizer"]["preconditioner"]["preconditioner_shards"] = 2
    resumed({0: OWN}, saved)
    assert ["was left alone" in r.getMessage() for r in caplog.records] == [True]


def test_what_was_saved_of_a_group_that_is_left_alone_now_is_dropped(caplog):
    saved = through_a_file(*trained({0: OWN}, range(STOP))[:2])
    model, optimizer, handle = resumed({0: OWN, 1: None}, saved)
    assert [r.getMessage() for r in caplog.records] == [
        "parameter group 1 is left alone, and was not when the checkpoint was saved: what that has of the "
        "group's statistics is dropped"
    ]
    metrics = handle.metrics()
    assert (metrics["blocks"], metrics["blocks_with_version"]) == (5, 5)
    assert handle.state_dict()["state"][2:4] == [{"step": -1}] * 2
    train(model, optimizer, range(STOP, END))
    assert handle.metrics()["step"] == END


def test_before_the_first_step_there_is_nothing_to_drop(caplog):
    resumed({1: None}, through_a_file(*attached({})[:2]))
    resumed({}, through_a_file(*attached({1: None})[:2]))
    assert not caplog.records


def parts(model, optimizer, handle):
    own = get_optimizer_state_dict(model, optimizer)
    return {"model": model.state_dict(), "optimizer": own, "preconditioner": handle}


def load(run, path, **planner):
    model, optimizer, _ = run
    state = parts(*run)
    dcp.load(state, checkpoint_id=path, planner=DefaultLoadPlanner(**planner))
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    return run


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_handle_is_saved_and_loaded_by_torch_distributed_checkpoint(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    for name, groups in (("left alone", GROUPS), ("not", {0: OWN})):
        dcp.save(parts(*trained(groups, range(STOP))), checkpoint_id=tmp_path / name)

    model, optimizer, _ = load(attached(GROUPS), tmp_path / "left alone")
    assert not caplog.records
    train(model, optimizer, range(STOP, END))
    assert_same(model, trained(GROUPS, range(END))[0])

    _, _, handle = load(attached(GROUPS), tmp_path / "not")
    assert "group 1 is left alone, and was not" in caplog.text
    assert handle.metrics()["blocks_with_version"] == 5

    # Torch asks for every key that is there now, and knows of no group that begins anew.
    _, _, handle = load(trained({0: OWN}, range(STOP)), tmp_path / "left alone", allow_partial_load=True)
    assert "group 1 was left alone when the checkpoint was saved" in caplog.text
    assert handle.metrics()["blocks_with_version"] == 5
