"""Training loops as people write them: scaled and accumulated losses, checkpointed activations, closures."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kfac_models import Words, batch, loss_of, seeded, train
from preconditioner_client import KFAC, LocalExchange, StalenessConfig

STEPS = range(6)


def make(model, **settings):
    staleness = StalenessConfig(refresh_every=1, max_staleness=1)
    return KFAC(model, **({"lr": 1e-2, "service": LocalExchange(), "staleness": staleness} | settings))


@pytest.fixture
def expected():
    model = seeded(Words)
    train(model, make(model), STEPS)
    return model


def assert_close(model, other):
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_a_gradient_scaler_and_a_step_that_it_skips(expected):
    model = seeded(Words)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
    optimizer = make(model, grad_scale=scaler.get_scale)
    for step in STEPS:
        for spoiled in (step == 2, False) if step == 2 else (False,):
            optimizer.zero_grad()
            loss = loss_of(model, *batch(model, step)) * (float("inf") if spoiled else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    assert scaler.get_scale() == 512.0
    assert_close(model, expected)


def test_gradients_accumulated_over_parts_of_a_batch(expected):
    model = seeded(Words)
    optimizer = make(model, grad_scale=lambda: 0.5)
    for step in STEPS:
        optimizer.zero_grad()
        inputs, targets = batch(model, step)
        for half in (slice(8), slice(8, 16)):
            (loss_of(model, inputs[half], targets[half]) / 2).backward()
        optimizer.step()
    assert_close(model, expected)


def test_checkpointed_activations(expected):
    class Checkpointed(Words):
        def forward(self, indices):
            return checkpoint(super().forward, indices, use_reentrant=False)

    model = seeded(Checkpointed)
    train(model, make(model), STEPS)
    assert_close(model, expected)


def test_a_closure(expected):
    model = seeded(Words)
    optimizer = make(model)
    for step in STEPS:

        def closure(step=step):
            optimizer.zero_grad()
            loss = loss_of(model, *batch(model, step))
            loss.backward()
            return loss

        assert optimizer.step(closure).item() > 0
    assert_close(model, expected)


def test_layers_of_an_attention_that_are_never_called_take_the_gradients_step():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    optimizer = make(model)
    inputs = torch.randn(4, 3, 8)
    for _ in range(3):
        optimizer.zero_grad()
        F.mse_loss(model(inputs), torch.zeros_like(inputs)).backward()
        optimizer.step()
    metrics = optimizer.metrics()
    # The attention multiplies by the weight of its output layer without calling it.
    assert (metrics["blocks"], metrics["blocks_with_version"]) == (3, 2)


def test_a_copy_is_refused_with_what_to_do_instead():
    with pytest.raises(TypeError, match="a KFAC optimizer holds a connection"):
        copy.deepcopy(make(Words()))
