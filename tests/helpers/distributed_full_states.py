"""Scenarios of full state dicts of ``torch.distributed.checkpoint``, of shards and of replicas."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from distributed_shard_checkpoints import Warnings
from distributed_training import make_optimizer
from sharded_training import END, STOP, aligned, assert_same, sharded, train, whole

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
BROADCAST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def resumed_from_full(make, state, weights):
    """A new model and optimizer from a full state dict on rank 0, and what was logged meanwhile."""
    model, optimizer = make()
    for p, value in zip(model.parameters(), weights, strict=True):
        p.data.copy_(
            distribute_tensor(value, p.device_mesh, p.placements) if isinstance(p, DTensor) else value
        )
    with Warnings() as log:
        set_optimizer_state_dict(model, optimizer, state if dist.get_rank() == 0 else {}, options=BROADCAST)
    return model, optimizer, log.messages


def replicas():
    model = aligned()
    return model, make_optimizer(model)


def whole_state_by_torch(folder):
    """A full state dict on rank 0, as torch gathers it: moments are whole, blocks are rank 0's."""
    for make in (lambda: sharded(aligned), replicas):
        model, optimizer = make()
        train(model, optimizer, range(STOP))
        with Warnings() as log:
            state = get_optimizer_state_dict(model, optimizer, options=FULL)
        # DTensors are gathered without a warning, so only of replicas it is known that parts will lack.
        assert ["full_state_dict" in message for message in log.messages] == [True] * (make is replicas)
        assert not any(isinstance(v, DTensor) for s in state.get("state", {}).values() for v in s.values())
        weights = [whole(p).detach().clone() for p in model.parameters()]
        other, resumed, logged = resumed_from_full(make, state, weights)
        assert resumed.metrics()["step"] == STOP
        if dist.get_rank() == 0:
            assert not logged
            assert resumed.metrics()["blocks_with_version"] == resumed.metrics()["blocks"]
        else:
            blocks = resumed.metrics()["blocks"]
            (warning,) = logged
            assert warning.startswith(f"{blocks} of {blocks} blocks of this rank start with new statistics")
            assert "full_state_dict" in warning
            assert "consolidate_state_dict(to=0)" in warning
        train(other, resumed, range(STOP, END))


def a_consolidated_state_is_whole_in_a_full_state_dict_of_torch(folder):
    for make in (lambda: sharded(aligned), replicas):
        model, optimizer = make()
        train(model, optimizer, range(STOP))
        weights = [whole(p).detach().clone() for p in model.parameters()]
        optimizer.consolidate_state_dict()
        # Asking does not change what the next one is told.
        for _ in range(2):
            state = get_optimizer_state_dict(model, optimizer, options=FULL)
        other, resumed, logged = resumed_from_full(make, state, weights)
        assert not logged
        train(model, optimizer, range(STOP, END))
        train(other, resumed, range(STOP, END))
        assert_same(other, model)


def a_full_state_dict_of_torch_without_the_whole_on_rank_0_is_warned_of(folder):
    refused = {
        "shards": r"lacks 'exp_avg', .* the rank that consolidate_state_dict\(to=0\) names has it",
        "replicas": r"lacks the block .* consolidate_state_dict\(\) .* that of the rank it names \(to=0\)",
    }
    for name, make in (("shards", lambda: sharded(aligned)), ("replicas", replicas)):
        model, optimizer = make()
        train(model, optimizer, range(STOP))
        optimizer.consolidate_state_dict(to=1)
        with Warnings() as log:
            for _ in range(2):
                get_optimizer_state_dict(model, optimizer, options=FULL)
            state = optimizer.state_dict()
            optimizer.consolidate_state_dict(to=0)
            optimizer.state_dict()
        assert len(log.messages) == (1 if dist.get_rank() == 0 else 0), log.messages
        for message in log.messages:
            assert "consolidate_state_dict(to=1) gave the whole to rank 1" in message
            assert "call consolidate_state_dict(to=0)" in message
        if dist.get_rank() == 0:
            torch.save(state, folder / f"not-the-whole-{name}.pt")
        dist.barrier()
        if dist.get_rank() == 1:
            part = torch.load(folder / f"not-the-whole-{name}.pt", weights_only=True)
            with pytest.raises(ValueError, match=refused[name]):
                make()[1].load_state_dict(part)
