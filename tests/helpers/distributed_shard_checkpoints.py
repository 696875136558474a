"""Scenarios of checkpoints of shards: by torch, and consolidated."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from distributed_training import (
    gradient,
    on_all_ranks,
    set_gradients,
)
from preconditioner_client import (
    StatisticsConfig,
)
from scripted_exchange import ScriptedExchange
from sharded_training import (
    END,
    STOP,
    aligned,
    alone,
    assert_same,
    sharded,
    train,
    uneven,
    whole,
)

OPTIONS = {"nested": StateDictOptions(), "flat": StateDictOptions(flatten_optimizer_state_dict=True)}


def state_of(model, optimizer, options=None):
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }


def load(model, optimizer, path, options=None, partial=False):
    state = state_of(model, optimizer, options)
    dcp.load(state, checkpoint_id=path, planner=DefaultLoadPlanner(allow_partial_load=partial))
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)


def shards_resume_bit_for_bit_with_torch(folder):
    for make in (aligned, uneven):
        uninterrupted = sharded(make)
        train(*uninterrupted, range(END))
        model, optimizer = sharded(make)
        train(model, optimizer, range(STOP))
        for name, options in OPTIONS.items():
            path = folder / f"shards-{make.__name__}-{name}"
            dcp.save(state_of(model, optimizer, options), checkpoint_id=path)
            resumed = sharded(make)
            load(*resumed, path, options)
            assert resumed[1].metrics()["step"] == STOP
            train(*resumed, range(STOP, END))
            assert_same(resumed[0], uninterrupted[0])
            assert resumed[1].metrics()["waits"] == 0


def a_checkpoint_that_is_written_beside_training_is_of_its_step(folder):
    """Steps that are made while torch writes it change nothing in it."""
    model, optimizer = sharded(uneven)
    train(model, optimizer, range(STOP))
    # A group of its own, since its thread and the steps would mix their collectives.
    writing = dcp.async_save(
        state_of(model, optimizer), checkpoint_id=folder / "beside", process_group=dist.new_group()
    )
    train(model, optimizer, range(STOP, END))
    writing.result()
    resumed = sharded(uneven)
    load(*resumed, folder / "beside")
    assert resumed[1].metrics()["step"] == STOP
    train(*resumed, range(STOP, END))
    assert_same(resumed[0], model)


def a_consolidated_state_of_shards_loads_everywhere(folder):
    model, optimizer = sharded(aligned)
    train(model, optimizer, range(STOP))
    weights = {name: whole(p).clone() for name, p in model.named_parameters()}
    optimizer.consolidate_state_dict()
    if dist.get_rank() == 0:
        torch.save({"model": weights, "optimizer": optimizer.state_dict()}, folder / "shards-whole.pt")
    dist.barrier()
    state = torch.load(folder / "shards-whole.pt", weights_only=True)
    uninterrupted, reference = alone(aligned)
    train(uninterrupted, reference, range(END))

    single, other = alone(aligned)
    single.load_state_dict(state["model"])
    other.load_state_dict(state["optimizer"])
    train(single, other, range(STOP, END))
    assert_same(single, uninterrupted)

    again, third = sharded(aligned)
    for name, p in again.named_parameters():
        p.data.copy_(distribute_tensor(state["model"][name], p.device_mesh, p.placements))
    third.load_state_dict(state["optimizer"])
    train(again, third, range(STOP, END))
    assert_same(again, uninterrupted)


def a_part_of_other_shards_is_refused_by_name(folder):
    model, optimizer = sharded(uneven)
    train(model, optimizer, range(2))
    state = optimizer.state_dict()
    key = model[0].weight
    torch.manual_seed(0)
    parts = on_all_ranks(tuple(key.to_local().shape))
    assert len(set(parts)) > 1
    local = state["state"][0]["exp_avg"].to_local()
    state["state"][0]["exp_avg"] = DTensor.from_local(
        local[:1].clone(),
        key.device_mesh,
        key.placements,
        run_check=False,
        shape=key.shape,
        stride=key.stride(),
    )
    with pytest.raises(
        ValueError, match=r"0\.weight: exp_avg in the checkpoint is one rank's part \(1, 12\)"
    ):
        sharded(uneven)[1].load_state_dict(state)


def shards_of_replicas_resume_bit_for_bit(folder):
    uninterrupted = sharded(uneven, "hsdp")
    train(*uninterrupted, range(END))
    model, optimizer = sharded(uneven, "hsdp")
    train(model, optimizer, range(STOP))
    dcp.save(state_of(model, optimizer), checkpoint_id=folder / "hsdp")
    resumed = sharded(uneven, "hsdp")
    load(*resumed, folder / "hsdp")
    train(*resumed, range(STOP, END))
    assert_same(resumed[0], uninterrupted[0])


class Warnings(logging.Handler):
    """What the client logged in a ``with`` block."""

    def __init__(self):
        super().__init__()
        self.messages = []

    def __enter__(self):
        logging.getLogger("preconditioner_client").addHandler(self)
        return self

    def __exit__(self, *_):
        logging.getLogger("preconditioner_client").removeHandler(self)

    def emit(self, record):
        self.messages.append(record.getMessage())


def another_number_of_ranks_keeps_what_it_can(folder):
    """Reads what two ranks saved."""
    for make, lost in ((aligned, False), (uneven, True)):
        with Warnings() as log:
            model, optimizer = sharded(make)
            load(model, optimizer, folder / f"shards-{make.__name__}-nested", partial=True)
        warned = [m for m in log.messages if "start with new statistics" in m]
        single, reference = alone(make, service=ScriptedExchange())
        train(single, reference, range(STOP))
        for p, q in zip(model.parameters(), single.parameters(), strict=True):
            state, expected = optimizer.state[p], reference.state[q]
            assert state["step"] == expected["step"] == STOP
        counts = on_all_ranks(len(warned))
        assert max(counts) <= 1
        assert bool(sum(counts)) == lost, log.messages
        train(model, optimizer, range(STOP, END))
        assert all(bool(whole(p).isfinite().all()) for p in model.parameters())
        if not lost:
            uninterrupted = alone(make)
            train(*uninterrupted, range(END))
            assert_same(model, uninterrupted[0])


def moments_are_resharded_exactly(folder):
    """Reads what two ranks saved: moments do not depend on what was preconditioned."""
    model, optimizer = sharded(uneven)
    load(model, optimizer, folder / "shards-uneven-nested", partial=True)
    single, reference = alone(uneven, service=ScriptedExchange())
    train(single, reference, range(STOP))
    for p, q in zip(model.parameters(), single.parameters(), strict=True):
        for key in ("exp_avg", "second_moment"):
            assert torch.equal(whole(optimizer.state[p][key]), reference.state[q][key])


def a_consolidated_state_is_saved_by_torch(folder):
    model, optimizer = sharded(uneven)
    train(model, optimizer, range(STOP))
    optimizer.consolidate_state_dict()
    for name, options in OPTIONS.items():
        dcp.save(state_of(model, optimizer, options), checkpoint_id=folder / f"consolidated-{name}")
    train(model, optimizer, range(STOP, END))
    for name, options in OPTIONS.items():
        resumed = sharded(uneven)
        load(*resumed, folder / f"consolidated-{name}", options)
        train(*resumed, range(STOP, END))
        assert_same(resumed[0], model)


def what_a_rank_gives_after_a_consolidation_is_not_loaded_into(folder):
    model, optimizer = sharded(aligned)
    train(model, optimizer, range(STOP))
    path = folder / "before-a-consolidation"
    dcp.save(state_of(model, optimizer), checkpoint_id=path)
    optimizer.consolidate_state_dict()
    if dist.get_rank() == 0:
        load(model, optimizer, path)
    else:
        with pytest.raises(
            ValueError,
            match=r"consolidate_state_dict\(to=0\) was called since .* needs an optimizer made anew",
        ):
            load(model, optimizer, path)


def parameters_without_gradients_have_lost_no_statistics(folder):
    """Neither one that never had any, nor one that had none in the steps that statistics take."""
    for every, without in ((1, lambda step: {2, 3}), (4, lambda step: {2} if step % 4 == 3 else set())):

        def make(every=every):
            return sharded(aligned, statistics=StatisticsConfig(every=every))

        model, optimizer = make()
        for step in range(8):
            set_gradients(model, step, without(step))
            for index, p in enumerate(model.parameters()):
                if p.grad is not None:
                    p.grad = distribute_tensor(gradient(p.shape, index, step), p.device_mesh, p.placements)
            optimizer.step()
        path = folder / f"without-gradients-{every}"
        dcp.save(state_of(model, optimizer), checkpoint_id=path)
        with Warnings() as log:
            resumed = make()
            load(*resumed, path)
        assert resumed[1].metrics()["step"] == 8
        assert not log.messages
