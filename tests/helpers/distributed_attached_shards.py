"""Scenarios of a preconditioner attached to AdamW under ``fully_shard``."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from distributed_training import make_attached
from preconditioner_client import GraftingConfig, GroupConfig
from sharded_training import END, STOP, aligned, assert_same, shard, train, uneven

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def sharded(make, kind="fsdp", **settings):
    """A model, its AdamW, and the handle of what is attached to that."""
    model = shard(make(), kind)
    return model, *make_attached(model, **settings)


def alone(make, **settings):
    model = make()
    return model, *make_attached(model, distributed="off", **settings)


def trained(run, steps):
    train(*run[:2], steps)
    return run


def the_weights_are_those_of_one_process(folder):
    """Whatever form AdamW and the grafting have, but for norms of whole layers, which shards sum apart."""
    for way, method, rounding in (
        ("foreach", "sgd", {}),
        ("fused", "adam", {}),
        ("one by one", "rmsprop", {}),
        ("foreach", "lamb", {"rtol": 1e-3, "atol": 1e-4}),
    ):
        model, _, handle = trained(sharded(aligned, way=way, method=method), range(16))
        single, _, reference = trained(alone(aligned, way=way, method=method), range(16))
        assert_same(model, single, **rounding)
        assert handle.metrics()["step"] == reference.metrics()["step"] == 16
        assert handle.metrics()["versions_adopted"] >= 2 * handle.metrics()["blocks"] > 0


def training_with_backward_and_clipping(folder):
    """Every rank has its part of the batch; one process has all of it, and adds in another order.

    While weights move by more than 0.1 that makes less than 1e-3 of a difference.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16 * dist.get_world_size(), 12, generator=generator)
    own = x[dist.get_rank() :: dist.get_world_size()]
    runs = sharded(aligned), alone(aligned)
    for (model, optimizer, _), part in zip(runs, (own, x), strict=True):
        for _ in range(16):
            optimizer.zero_grad()
            model(part).sub(part[:, :1]).square().mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
    moved = max((p - q).abs().max() for p, q in zip(model.parameters(), aligned().parameters(), strict=True))
    assert moved > 0.1
    assert_same(runs[0][0], runs[1][0], rtol=0, atol=1e-3)


def parts(model, optimizer, handle):
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "preconditioner": handle,
    }


def load(run, path, partial=False):
    model, optimizer, _ = run
    state = parts(*run)
    dcp.load(state, checkpoint_id=path, planner=DefaultLoadPlanner(allow_partial_load=partial))
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    return run


def assert_resumes(path, make, **settings):
    """Saved in the middle and loaded into new objects, it ends with the bits of the uninterrupted run."""
    uninterrupted = trained(sharded(make, **settings), range(END))
    saved = trained(sharded(make, **settings), range(STOP))
    dcp.save(parts(*saved), checkpoint_id=path)
    resumed = load(sharded(make, **settings), path)
    assert resumed[2].metrics()["step"] == STOP
    trained(resumed, range(STOP, END))
    assert_same(resumed[0], uninterrupted[0])
    metrics = resumed[2].metrics()
    assert metrics["wait_timeouts"] == metrics["late_adoptions"] == 0
    assert metrics["versions_adopted"] >= metrics["blocks"]
    for run in (uninterrupted, saved, resumed):
        run[2].close()
    return uninterrupted[0]


def it_resumes_bit_for_bit_with_torch(folder):
    assert_resumes(folder / "attached-aligned", aligned, method="adam")
    assert_resumes(folder / "attached-uneven", uneven, way="fused", method="sgd")


GROUPS = {
    "cuts": (2, 4),
    "groups": {0: None, 1: GroupConfig(grafting=GraftingConfig(method="rmsprop"))},
}
"""The first layer is left alone, the second has a grafting of its own, the last the common one."""


def groups_that_differ_or_are_left_alone(folder):
    """Also through checkpoints: of torch, and whole ones."""
    model = assert_resumes(folder / "attached-groups", aligned, method="lamb", **GROUPS)
    single, _, reference = trained(alone(aligned, method="lamb", **GROUPS), range(END))
    assert_same(model, single, rtol=1e-3, atol=1e-4)
    assert reference.metrics()["blocks"] == 32  # of (64, 32), and no other

    run = trained(sharded(aligned, method="lamb", **GROUPS), range(STOP))
    run[2].consolidate_state_dict()
    states = run[2].state_dict()["state"]
    assert states[:2] == [{"step": -1}] * 2
    if dist.get_rank() == 0:
        assert sum(key.endswith(".version") for key in states[2]) == 32


def replicas_of_shards_resume_bit_for_bit(folder):
    model = assert_resumes(folder / "attached-hsdp", aligned, kind="hsdp", method="adam")
    assert_same(model, trained(alone(aligned, method="adam"), range(END))[0])


def another_number_of_ranks_resumes_bit_for_bit_where_blocks_are_the_same(folder):
    """Reads what two ranks saved."""
    run = load(sharded(aligned, method="adam"), folder / "attached-aligned", partial=True)
    trained(run, range(STOP, END))
    assert_same(run[0], trained(alone(aligned, method="adam"), range(END))[0])


def a_whole_state_loads_into_one_process_and_into_shards(folder):
    """AdamW's by torch, what is attached by ``consolidate_state_dict``."""
    model, optimizer, handle = uninterrupted = trained(sharded(aligned, method="adam"), range(STOP))
    handle.consolidate_state_dict()
    state = {
        "model": get_model_state_dict(model, options=WHOLE),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=WHOLE),
        "preconditioner": handle.state_dict(),
    }
    if dist.get_rank() == 0:
        torch.save(state, folder / "attached-whole.pt")
    dist.barrier()
    trained(uninterrupted, range(STOP, END))
    for make in (alone, sharded):
        saved = torch.load(folder / "attached-whole.pt", weights_only=True)
        model, optimizer, handle = run = make(aligned, method="adam")
        options = WHOLE if make is sharded else None
        set_model_state_dict(model, saved["model"], options=options)
        handle.load_state_dict(saved["preconditioner"])
        set_optimizer_state_dict(model, optimizer, saved["optimizer"], options=options)
        trained(run, range(STOP, END))
        assert_same(model, uninterrupted[0])


def a_consolidated_state_is_saved_by_torch(folder):
    run = trained(sharded(uneven, method="adam"), range(STOP))
    run[2].consolidate_state_dict()
    dcp.save(parts(*run), checkpoint_id=folder / "attached-consolidated")
    trained(run, range(STOP, END))
    resumed = load(sharded(uneven, method="adam"), folder / "attached-consolidated")
    trained(resumed, range(STOP, END))
    assert_same(resumed[0], run[0])


def what_a_rank_gives_after_a_consolidation_is_refused_with_the_way_out(folder):
    path = folder / "attached-before-a-consolidation"
    run = trained(sharded(aligned, method="adam"), range(STOP))
    dcp.save(parts(*run), checkpoint_id=path)
    run[2].consolidate_state_dict()
    torch.save(run[2].state_dict(), folder / f"attached-of-{dist.get_rank()}.pt")
    dist.barrier()
    whole, part = (torch.load(folder / f"attached-of-{rank}.pt", weights_only=True) for rank in range(2))
    new = sharded(aligned, method="adam")[2]
    with pytest.raises(
        ValueError,
        match=r"lacks 'second_moment', .* the rank that consolidate_state_dict\(to=0\) names has it",
    ):
        new.load_state_dict(part)
    if dist.get_rank() == 0:
        load(run, path)
    else:
        with pytest.raises(ValueError, match=r"rank 0 alone has them\. .* needs a handle attached anew"):
            load(run, path)
    for handle in (new, run[2]):
        handle.load_state_dict(whole)
        assert handle.metrics()["blocks_with_version"] == handle.metrics()["blocks"] > 0


ON_TWO_RANKS = [
    the_weights_are_those_of_one_process,
    training_with_backward_and_clipping,
    it_resumes_bit_for_bit_with_torch,
    groups_that_differ_or_are_left_alone,
    a_whole_state_loads_into_one_process_and_into_shards,
    a_consolidated_state_is_saved_by_torch,
    what_a_rank_gives_after_a_consolidation_is_refused_with_the_way_out,
]
ON_FOUR_RANKS = [
    the_weights_are_those_of_one_process,
    training_with_backward_and_clipping,
    another_number_of_ranks_resumes_bit_for_bit_where_blocks_are_the_same,
    replicas_of_shards_resume_bit_for_bit,
]
SCENARIOS = [*ON_TWO_RANKS, *(s for s in ON_FOUR_RANKS if s not in ON_TWO_RANKS)]
