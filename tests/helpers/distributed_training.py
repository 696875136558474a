"""A small model with gradients that are the same bits on every rank, for tests of several ranks."""

from __future__ import annotations

import itertools

import torch
import torch.distributed as dist
from torch import nn

from preconditioner_client import (
    BlockingConfig,
    GraftingConfig,
    LocalExchange,
    Shampoo,
    StalenessConfig,
    attach,
)

SCHEDULED = StalenessConfig(refresh_every=3, adoption="scheduled", delay=5, max_staleness=20)
EAGER = StalenessConfig(refresh_every=3, max_staleness=20)


ADAMW = {"foreach": {"foreach": True}, "fused": {"fused": True}, "one by one": {"foreach": False}}
"""The ways in which torch's AdamW takes its tensors."""


POLICIES = (
    StalenessConfig(refresh_every=2, max_staleness=3, policy="graft"),
    StalenessConfig(refresh_every=2, max_staleness=4, policy="wait", stale_timeout=0.01),
    StalenessConfig(refresh_every=2, max_staleness=4, policy="keep"),
)
"""What to do about blocks that grow too old, which they do with a :class:`Faulty` exchange."""


def make_model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 8), nn.LayerNorm(8)
    ).to(dtype)


def make_optimizer(model, **settings):
    defaults = {
        "lr": 1e-2,
        "momentum": 0.9,
        "weight_decay": 0.01,
        "blocking": BlockingConfig(block_size=8),
        "staleness": SCHEDULED,
        "service": LocalExchange(1),
    }
    return Shampoo(model.named_parameters(), **(defaults | settings))


def make_attached(model, way="foreach", method="adam", cuts=(), **settings):
    """AdamW and the handle of what is attached to it.

    Args:
        model: whose parameters there are.
        way: see ``ADAMW``.
        method: of grafting.
        cuts: positions of the parameters that begin a group of their own.
        settings: of ``attach``.
    """
    defaults = {
        "grafting": GraftingConfig(method=method),
        "blocking": BlockingConfig(block_size=8),
        "staleness": SCHEDULED,
        "service": LocalExchange(1),
    }
    parameters = list(model.parameters())
    groups = [
        {"params": parameters[begin:end]} for begin, end in itertools.pairwise((0, *cuts, len(parameters)))
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, **ADAMW[way])
    return optimizer, attach(optimizer, model, **(defaults | settings))


class Faulty(LocalExchange):
    """Loses, delays or repeats what it brings, and connects anew; each rank at its own steps, 0 never."""

    def __init__(self, rank):
        super().__init__(delay=1)
        self._rank = rank
        self._held = []
        self._last = []

    def collect(self, step):
        arrived = super().collect(step)
        if self._rank == 0:
            return arrived
        step += self._rank - 1
        if step % 7 == 3:
            arrived = []
        if step % 5 == 2:
            self._held += arrived
            arrived = []
        if step % 4 == 0:
            arrived = self._held + arrived + self._last
            self._held = []
        if step == 11:
            self._counters["connections"] += 1
        self._last = arrived or self._last
        return arrived


def gradient(shape, index, step):
    """The gradient of a parameter at a step; the same on every rank and in every run."""
    generator = torch.Generator().manual_seed(1000 * step + index)
    return torch.randn(shape, generator=generator)


def set_gradients(model, step, without=()):
    for index, parameter in enumerate(model.parameters()):
        parameter.grad = (
            None
            if index in without
            else gradient(parameter.shape, index, step).to(parameter.dtype).to(parameter.device)
        )


def train(model, optimizer, steps, without=()):
    for step in steps:
        set_gradients(model, step, without)
        optimizer.step()


def weights(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def assert_same(model, other):
    """Two models have the same bits."""
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), f"{name}: up to {(a - b).abs().max()}"


def assert_replicas_are_equal(model):
    """Every rank has the same bits."""
    flat = torch.cat([p.detach().to(torch.float32).reshape(-1) for p in model.parameters()])
    gathered = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, flat)
    for rank, other in enumerate(gathered):
        assert torch.equal(flat, other), f"rank {dist.get_rank()} differs from rank {rank}"


def on_all_ranks(value):
    """What every rank has to say, by rank."""
    told = [None] * dist.get_world_size()
    dist.all_gather_object(told, value)
    return told
