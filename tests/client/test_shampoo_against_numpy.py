"""Fifty steps of the optimizer against an independent float64 transcription of the algorithm."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from numpy_shampoo import NumpyShampoo
from preconditioner_client import (
    BlockingConfig,
    GraftingConfig,
    LocalExchange,
    Ridge,
    RootConfig,
    Shampoo,
    StalenessConfig,
    StatisticsConfig,
)

STEPS = 50
# What float32 weights and statistics can agree to with float64 ones; the bar of the algorithm.
TOLERANCE = 1e-5

SHAPES = {
    # name: (shape, blocking, merged shape, pieces per merged dimension)
    "matrix": ((12, 7), BlockingConfig(block_size=64), (12, 7), [[(0, 12)], [(0, 7)]]),
    "kernel": (
        (6, 4, 3, 3),
        BlockingConfig(block_size=64, merge_dims=False),
        (6, 4, 3, 3),
        [[(0, 6)], [(0, 4)], [(0, 3)], [(0, 3)]],
    ),
    "merged kernel": ((6, 4, 3, 3), BlockingConfig(block_size=64), (6, 36), [[(0, 6)], [(0, 36)]]),
    "order 3": (
        (5, 4, 3),
        BlockingConfig(block_size=64, merge_dims=False),
        (5, 4, 3),
        [[(0, 5)], [(0, 4)], [(0, 3)]],
    ),
    "order 5": (
        (4, 3, 2, 3, 2),
        BlockingConfig(block_size=64, merge_dims=False),
        (4, 3, 2, 3, 2),
        [[(0, 4)], [(0, 3)], [(0, 2)], [(0, 3)], [(0, 2)]],
    ),
    "uneven blocks": (
        (13, 10),
        BlockingConfig(block_size=8),
        (13, 10),
        [[(0, 8), (8, 13)], [(0, 8), (8, 10)]],
    ),
}


def gradients(shape, weight, step, generator):
    """A noisy ill-conditioned quadratic, so that gradients depend on the weights."""
    scale = torch.logspace(0, -1.5, weight.numel(), dtype=torch.float64).reshape(shape)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    return scale * (weight.to(torch.float64) - 1.0) + 0.3 * noise


def differences(ours, parameter, oracle, shape):
    """Of the weights after the same gradients."""
    noise = torch.Generator().manual_seed(8)
    for step in range(STEPS):
        gradient = gradients(shape, torch.from_numpy(oracle.w), step, noise)
        parameter.grad = gradient.to(torch.float32)
        ours.step()
        oracle.step(gradient.to(torch.float32).numpy())
    return np.linalg.norm(parameter.detach().numpy() - oracle.w) / np.linalg.norm(oracle.w)


@pytest.mark.parametrize("shape_name", SHAPES)
@pytest.mark.parametrize("grafting", ["none", "sgd", "adagrad", "rmsprop", "adam"])
@pytest.mark.parametrize("accumulation", ["ema", "sum"])
def test_fifty_steps_agree(shape_name, grafting, accumulation):
    shape, blocking, merged, pieces = SHAPES[shape_name]
    lr = 1e-2
    generator = torch.Generator().manual_seed(7)
    start = torch.randn(shape, generator=generator)
    parameter = torch.nn.Parameter(start.clone())
    momentum = 0.9 if grafting == "sgd" else 0.0
    # A well-conditioned ridge: the root amplifies float32 rounding of the statistics by its condition.
    ours = Shampoo(
        [parameter],
        lr=lr,
        beta1=0.9,
        momentum=momentum,
        nesterov=momentum > 0,
        weight_decay=0.01,
        grafting=GraftingConfig(method=grafting, beta2=0.99),
        statistics=StatisticsConfig(accumulation=accumulation, beta=0.95),
        blocking=blocking,
        root=RootConfig(ridge=Ridge(value=1e-2)),
        staleness=StalenessConfig(refresh_every=1, max_staleness=1),
        service=LocalExchange(delay=0),
    )
    oracle = NumpyShampoo(
        start.numpy(),
        lr=lr,
        merged=merged,
        pieces=pieces,
        grafting=grafting,
        accumulate=accumulation,
        momentum=momentum,
        nesterov=momentum > 0,
        weight_decay=0.01,
        ridge=1e-2,
    )
    assert differences(ours, parameter, oracle, shape) <= TOLERANCE
    assert ours.metrics()["versions_adopted"] == STEPS * ours.metrics()["blocks"]


@pytest.mark.parametrize("shape_name", ["matrix", "order 3", "uneven blocks"])
@pytest.mark.parametrize("grafting", ["none", "sgd", "adagrad", "adam"])
@pytest.mark.parametrize(("delay", "blend_steps"), [(0, 0), (7, 5)])
def test_averages_that_are_grafted_agree(shape_name, grafting, delay, blend_steps):
    """Momentum as published in 2020."""
    shape, blocking, merged, pieces = SHAPES[shape_name]
    start = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    parameter = torch.nn.Parameter(start.clone())
    common = {"lr": 1e-2, "beta1": 0.5, "momentum": 0.9, "dampening": 0.8, "weight_decay": 0.01}
    ours = Shampoo(
        [parameter],
        **common,
        momentum_of="preconditioned",
        grafting=GraftingConfig(method=grafting, beta2=0.99, blend_steps=blend_steps),
        statistics=StatisticsConfig(beta=0.95),
        blocking=blocking,
        root=RootConfig(ridge=Ridge(value=1e-2)),
        staleness=StalenessConfig(refresh_every=3, max_staleness=50, stagger=False),
        service=LocalExchange(delay=delay),
    )
    oracle = NumpyShampoo(
        start.numpy(),
        **common,
        graft_averages=True,
        merged=merged,
        pieces=pieces,
        grafting=grafting,
        ridge=1e-2,
        refresh_every=3,
        delay=delay,
        blend_steps=blend_steps,
    )
    assert differences(ours, parameter, oracle, shape) <= TOLERANCE
    assert ours.metrics()["versions_adopted"] > 10 * ours.metrics()["blocks"]
