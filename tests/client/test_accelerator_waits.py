"""Steps on an accelerator: the host waits for none, nor for what becomes of one with NaN or infinity."""

from __future__ import annotations

import contextlib

import pytest
import torch

from guarded_training import SETTINGS, Answering, make_model, make_optimizer, set_gradients, weights_of
from kfac_models import Convolutional, Words, batch, loss_of, seeded
from preconditioner_client import KFAC, AdaptiveRefresh, GraftingConfig, StalenessConfig, attach
from scripted_exchange import ScriptedExchange

OFTEN = StalenessConfig(refresh_every=1, max_staleness=100)


def train_without_waiting(accelerator, model, step, steps=8):
    for number in range(steps):
        # Some parameters have no gradient in some steps.
        set_gradients(model, number, without={0, 3} if number % 3 == 2 else ())
        with accelerator.no_waiting() if number >= accelerator.warm_up else contextlib.nullcontext():
            step()


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_no_step_makes_the_host_wait(accelerator, settings):
    model, exchange = make_model(device=accelerator.device), Answering()
    optimizer = make_optimizer(model.named_parameters(), **settings, service=exchange)
    train_without_waiting(accelerator, model, optimizer.step)
    metrics = optimizer.metrics()
    assert metrics["versions_adopted"] > 0
    assert len(exchange.offered) > metrics["blocks"]


@pytest.mark.parametrize("place", ["host", "accelerator"])
def test_whatever_the_learning_rate_is(accelerator, place):
    model = make_model(device=accelerator.device)
    device = accelerator.device if place == "accelerator" else "cpu"
    optimizer = make_optimizer(
        model.parameters(), lr=torch.full((), 0.01, device=device), weight_decay=0.1, service=Answering()
    )
    # Only without any state the learning rate is asked whether the step is torch's for a checkpoint.
    set_gradients(model, 0)
    optimizer.step()
    train_without_waiting(accelerator, model, optimizer.step)


@pytest.mark.parametrize("groups", [None, {1: None}])
@pytest.mark.parametrize("method", ["sgd", "adam"])
def test_an_attached_optimizer_does_not_wait_either(accelerator, method, groups):
    model = make_model(device=accelerator.device)
    parameters = list(model.parameters())
    inner = torch.optim.SGD([{"params": parameters[:6]}, {"params": parameters[6:]}], lr=1e-2)
    handle = attach(
        inner,
        model,
        groups=groups,
        service=Answering(),
        staleness=OFTEN,
        grafting=GraftingConfig(method=method),
    )
    # GradScaler leaves its verdict with a fused optimizer, which this one is not; on a device of its own.
    index = 1 if accelerator.is_exact else 0
    found_inf = torch.zeros((), device=torch.device("cuda", index))
    inner.found_inf = found_inf
    inner.register_step_pre_hook(lambda *_: setattr(inner, "found_inf", None))
    inner.register_step_post_hook(lambda *_: setattr(inner, "found_inf", found_inf))
    train_without_waiting(accelerator, model, inner.step)
    assert handle.metrics()["versions_adopted"] > 0
    before = weights_of(model)
    found_inf.fill_(1.0)
    set_gradients(model, 9)
    inner.step()
    assert all(map(torch.equal, weights_of(model), before))


@pytest.mark.parametrize("kind", [Convolutional, Words])
def test_nor_does_one_with_layers(accelerator, kind):
    model = seeded(kind).to(accelerator.device)
    scale = torch.ones((), device=accelerator.device)
    optimizer = KFAC(
        model,
        service=Answering(),
        staleness=OFTEN,
        adaptive_refresh=AdaptiveRefresh(similar_below=1e-9),
        grad_scale=lambda: scale,
    )
    for step in range(8):
        inputs, targets = (tensor.to(accelerator.device) for tensor in batch(model, step))
        with accelerator.no_waiting() if step >= accelerator.warm_up else contextlib.nullcontext():
            optimizer.zero_grad()
            loss_of(model, inputs, targets).backward()
            optimizer.step()
    assert optimizer.metrics()["versions_adopted"] > 0
    # No two factors were so much alike.
    assert set(optimizer._engine.refresher.intervals) == {1}


def test_an_arrival_serves_once_its_copy_is_there(pretended):
    model, exchange = make_model(device=pretended.device), ScriptedExchange()
    optimizer = make_optimizer(model.parameters(), service=exchange, staleness=OFTEN)
    adopted = []
    for step in range(pretended.runtime.lag + 3):
        set_gradients(model, step)
        with pretended.no_waiting():
            optimizer.step()
        if step == 0:
            exchange.answer(0, 1)
        adopted.append(optimizer.metrics()["versions_adopted"])
    assert adopted == [0] * (pretended.runtime.lag + 1) + [1, 1]


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(accelerator):
    model = make_model(device=accelerator.device)
    optimizer = make_optimizer(model.named_parameters())
    for step in range(3):
        set_gradients(model, step)
        optimizer.step()
    before = weights_of(model)
    set_gradients(model, 3)
    model[0].weight.grad[0, 0] = float("inf")
    optimizer.step()
    assert all(map(torch.equal, before, weights_of(model)))
    accelerator.synchronize()
    set_gradients(model, 4)
    optimizer.step()
    assert optimizer.metrics()["nonfinite_steps"] == 1
