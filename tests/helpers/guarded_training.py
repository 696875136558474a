"""Training whose steps look the same on every device: settings, a model, and gradients of random numbers."""

from __future__ import annotations

import torch
from torch import nn

from preconditioner_client import (
    BlockingConfig,
    GraftingConfig,
    LocalExchange,
    Shampoo,
    StalenessConfig,
    StatisticsConfig,
)
from scripted_exchange import ScriptedExchange

STALENESS = StalenessConfig(refresh_every=2, max_staleness=20)

SETTINGS = {
    "default": {},
    "momentum": {"momentum": 0.9, "weight_decay": 0.1, "dampening": 0.5},
    "nesterov": {
        "momentum": 0.9,
        "nesterov": True,
        "beta1": 0.0,
        "grafting": GraftingConfig(method="rmsprop"),
    },
    "lamb": {"grafting": GraftingConfig(method="lamb", blend_steps=5), "weight_decay": 0.1},
    "lars": {"grafting": GraftingConfig(method="lars"), "maximize": True},
    "averages, grafted": {
        "momentum": 0.9,
        "momentum_of": "preconditioned",
        "dampening": 0.9,
        "grafting": GraftingConfig(method="lars", blend_steps=3),
        "weight_decay": 0.1,
    },
    "coupled sum": {
        "weight_decay": 0.1,
        "decoupled_weight_decay": False,
        "grafting": GraftingConfig(method="adagrad"),
        "statistics": StatisticsConfig(accumulation="sum", every=2),
    },
}


class Answering(ScriptedExchange):
    """Answers every snapshot at once."""

    def offer(self, snapshots, step):
        super().offer(snapshots, step)
        for snapshot in snapshots:
            self.answer(snapshot.block, snapshot.step)


def make_model(dtype=torch.float32, device="cpu"):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 12, 3), nn.Linear(12, 20), nn.LayerNorm(20), nn.Linear(20, 12)
    return nn.Sequential(*layers).to(dtype).to(device)


def make_optimizer(parameters, **settings):
    defaults = {"lr": 1e-2, "blocking": BlockingConfig(block_size=8), "staleness": STALENESS}
    return Shampoo(parameters, **(defaults | {"service": LocalExchange(1)} | settings))


def set_gradients(model, step, without=()):
    """The same numbers on every device; none for the parameters at some positions."""
    generator = torch.Generator().manual_seed(step)
    for index, parameter in enumerate(model.parameters()):
        gradient = torch.randn(parameter.shape, generator=generator, device="cpu", dtype=torch.float32)
        gradient = gradient.to(parameter.dtype).to(parameter.device)
        parameter.grad = None if index in without else gradient


def weights_of(model):
    """Copies on the host."""
    return [parameter.detach().clone().cpu() for parameter in model.parameters()]
