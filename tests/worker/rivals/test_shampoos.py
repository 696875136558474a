"""Shampoo as of 2020 and synchronous Shampoo, as they are built for comparisons, against NumPy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from numpy_shampoo import NumpyShampoo
from preconditioner_worker.contenders import Shampoo2020Settings, SynchronousShampooSettings

STEPS = 40
SHAPE = (9, 14)
LR = 0.05
# Roots amplify the float32 rounding of statistics by the condition number that their ridge leaves.
TOLERANCE = 2e-4


def trained(settings, oracle):
    """Weights of both after the same gradients; those of the oracle's own trajectory."""
    layer = nn.Linear(SHAPE[1], SHAPE[0], bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(oracle.w))
    optimizer = settings.build(layer)
    random = np.random.default_rng(3)
    curvature = np.logspace(0, -1, SHAPE[1])
    for _ in range(STEPS):
        gradient = (oracle.w - 1) * curvature + 0.3 * random.standard_normal(SHAPE)
        layer.weight.grad = torch.from_numpy(gradient.astype(np.float32))
        optimizer.step()
        oracle.step(gradient.astype(np.float32))
    metrics = optimizer.metrics()
    optimizer.close()
    return layer.weight.detach().double().numpy(), metrics


def make_oracle(**settings):
    start = np.random.default_rng(2).standard_normal(SHAPE).astype(np.float32)
    return NumpyShampoo(start, lr=LR, merged=SHAPE, pieces=[[(0, SHAPE[0])], [(0, SHAPE[1])]], **settings)


def difference(ours, theirs):
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


@pytest.mark.parametrize(("refresh_every", "delay", "blend_steps"), [(1, 0, 0), (4, 0, 10), (5, 7, 12)])
def test_shampoo_of_2020_is_its_equations(refresh_every, delay, blend_steps):
    """Sums, -1/4 per side, averages grafted with that of AdaGrad, and a blend from the first version on."""
    published = {
        "grafting": "adagrad",
        "accumulate": "sum",
        "beta1": 0.0,
        "epsilon": 1e-10,
        "momentum": 0.9,
        "dampening": 0.9,
        "refresh_every": refresh_every,
        "delay": delay,
    }
    oracle = make_oracle(**published, graft_averages=True, blend_steps=blend_steps)
    settings = Shampoo2020Settings(
        lr=LR, momentum=0.9, blend_steps=blend_steps, refresh_every=refresh_every, service=f"local:{delay}"
    )
    ours, metrics = trained(settings, oracle)
    assert metrics["versions_adopted"] == (STEPS - delay) // refresh_every
    assert difference(ours, oracle.w) <= TOLERANCE
    without = make_oracle(**published, blend_steps=blend_steps)
    trained(settings, without)
    assert difference(ours, without.w) > 10 * TOLERANCE


@pytest.mark.parametrize(("exponent", "order"), [(None, 4), (0.5, 2)])
def test_synchronous_shampoo_is_its_equations(exponent, order):
    """An EMA with bias correction, Adam's length, and roots of every k-th step, used in it."""
    oracle = make_oracle(grafting="adam", beta_statistics=0.99, refresh_every=6, order=order)
    ours, metrics = trained(SynchronousShampooSettings(lr=LR, refresh_every=6, exponent=exponent), oracle)
    assert metrics["versions_adopted"] == STEPS // 6
    assert difference(ours, oracle.w) <= TOLERANCE
