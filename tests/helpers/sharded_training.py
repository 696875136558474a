"""What is trained under ``fully_shard``, and the same in one process."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from distributed_training import (
    gradient,
    make_optimizer,
    set_gradients,
)

STOP, END = 10, 24


def aligned():
    """Shards of these rows on 2 and 4 ranks are cut into the same blocks as the whole."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 64), nn.LayerNorm(64))


def uneven():
    """Rows that neither 2 nor 4 ranks divide; one parameter has fewer rows than there are ranks."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 19), nn.Tanh(), nn.Linear(19, 13), nn.Tanh(), nn.Linear(13, 1))


def mesh_of(kind):
    size = dist.get_world_size()
    if kind == "hsdp":
        return init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh("cpu", (size,))


def shard(model, kind="fsdp"):
    mesh = mesh_of(kind)
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def sharded(make, kind="fsdp", **settings):
    model = shard(make(), kind)
    return model, make_optimizer(model, **settings)


def alone(make, **settings):
    model = make()
    return model, make_optimizer(model, distributed="off", **settings)


def train(model, optimizer, steps):
    """Gradients are the same whole ones everywhere; every rank is given its rows of them."""
    for step in steps:
        set_gradients(model, step)
        for index, p in enumerate(model.parameters()):
            if isinstance(p, DTensor):
                p.grad = distribute_tensor(gradient(p.shape, index, step), p.device_mesh, p.placements)
        optimizer.step()


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def assert_same(model, other, **tolerance):
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        a, b = whole(a), whole(b)
        if tolerance:
            torch.testing.assert_close(a, b, **tolerance)
        else:
            assert torch.equal(a, b), f"{name}: up to {(a - b).abs().max()}"
