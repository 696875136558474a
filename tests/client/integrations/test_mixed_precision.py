"""Precision, scaling, accumulation and compilation: what loops do around the optimizer."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from torch import nn

from preconditioner_client import LocalExchange, Shampoo, StalenessConfig, attach

STALENESS = StalenessConfig(refresh_every=2, max_staleness=10)


def model_and_data(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 4))
    x = torch.randn(64, 12) * torch.logspace(0, -2, 12)
    return model, x, x[:, 8:] * 100


def shampoo(model, **settings):
    settings = {"lr": 0.02, "staleness": STALENESS, "service": LocalExchange(), **settings}
    optimizer = Shampoo(model.named_parameters(), **settings)
    return optimizer, optimizer.metrics


def hooked(model, **settings):
    optimizer = torch.optim.AdamW(model.parameters(), **{"lr": 0.02, **settings})
    handle = attach(optimizer, model, staleness=STALENESS, service=LocalExchange())
    return optimizer, handle.metrics


both = pytest.mark.parametrize("make", [shampoo, hooked])


def statistics(optimizer):
    """All statistics, whichever of the two it is."""
    saved = optimizer.state_dict()
    states = saved["preconditioner"]["state"] if "preconditioner" in saved else list(saved["state"].values())
    return [s[key] for s in states for key in sorted(s) if ".statistics." in key]


def loss_of(model, x, y):
    return nn.functional.mse_loss(model(x).float(), y)


def train(model, x, y, optimizer, steps=30):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def same_weights(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@both
def test_autocast_with_float32_weights(make):
    model, x, y = model_and_data()
    optimizer, metrics = make(model)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            output = model(x)
            assert output.dtype == torch.bfloat16
        loss = nn.functional.mse_loss(output.float(), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert metrics()["versions_adopted"] > 0
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@both
def test_a_step_inside_of_autocast_is_the_same_step(make):
    """Autocast would otherwise round the operands of every product of the optimizer to bfloat16."""
    models = []
    for inside in (False, True):
        model, x, y = model_and_data()
        optimizer, _ = make(model)
        for _ in range(8):
            optimizer.zero_grad()
            loss_of(model, x, y).backward()
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                optimizer.step()
        models.append(model)
    assert same_weights(*models)


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_have_float32_statistics(make, dtype):
    model, x, y = model_and_data()
    model.to(dtype)
    # AdamW's default eps is zero in float16, and its first step then 0 / 0.
    optimizer, metrics = make(model, **({"eps": 1e-4} if make is hooked else {}))
    losses = train(model, x.to(dtype), y, optimizer)
    assert losses[-1] < 0.8 * losses[0]
    assert metrics()["versions_adopted"] > 0
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert {s.dtype for s in statistics(optimizer)} == {torch.float32}


def scaled_training(make, poisoned, **settings):
    """Training through a scaler; ``poisoned`` is a step whose gradient overflows, None for no such step."""
    model, x, y = model_and_data()
    optimizer, metrics = make(model, **settings)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    for step in range(7 if poisoned is not None else 6):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, x, y)).backward()
        if step == poisoned:
            model[0].weight.grad[0, 0] = float("inf")
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    return model, optimizer, metrics, scaler


@both
def test_a_scaler_skips_an_infinite_step_and_it_reaches_no_statistics(make):
    """The scale is a power of two, so scaling alone changes no bit."""
    model, optimizer, metrics, scaler = scaled_training(make, poisoned=3)
    expected, reference, _, untouched = scaled_training(make, poisoned=None)
    assert scaler.get_scale() == untouched.get_scale() / 2
    assert metrics()["step"] == 6
    assert same_weights(model, expected)
    for a, b in zip(statistics(optimizer), statistics(reference), strict=True):
        assert torch.equal(a, b)


def test_a_fused_optimizer_under_a_scaler():
    """Its step is called even when it must be skipped, and says so by ``found_inf``."""
    model, _, metrics, _ = scaled_training(hooked, poisoned=3, fused=True)
    expected, _, _, _ = scaled_training(hooked, poisoned=None, fused=True)
    assert metrics()["step"] == 6
    assert same_weights(model, expected)


def test_a_fused_optimizer_whose_gradients_are_still_scaled_is_refused():
    model, x, y = model_and_data()
    optimizer, _ = hooked(model, fused=True)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, x, y)).backward()
    with pytest.raises(RuntimeError, match="unscale_"):
        scaler.step(optimizer)


def test_a_closure_under_a_scaler_is_refused():
    model, x, y = model_and_data()
    optimizer, _ = shampoo(model)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, x, y)).backward()
    with pytest.raises(RuntimeError, match=r"[Cc]losure"):
        scaler.step(optimizer, closure=lambda: 0.0)


@both
def test_accumulated_gradients_are_those_of_the_whole_batch(make):
    """Statistics see the sum of the parts, once a step."""
    whole, x, y = model_and_data()
    parts = copy.deepcopy(whole)
    first, _ = make(whole)
    second, metrics = make(parts)
    train(whole, x, y, first, 6)
    for _ in range(6):
        second.zero_grad()
        for chunk in range(4):
            rows = slice(16 * chunk, 16 * chunk + 16)
            (loss_of(parts, x[rows], y[rows]) / 4).backward()
        second.step()
    assert metrics()["step"] == 6
    for a, b in zip(statistics(first), statistics(second), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(a.abs().max()))


@both
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model(make, backend):
    model, x, y = model_and_data()
    plain = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    optimizer, metrics = make(compiled)
    reference, _ = make(plain)
    compiled_losses = train(compiled, x, y, optimizer, 6)
    torch.testing.assert_close(compiled_losses, train(plain, x, y, reference, 6), rtol=1e-4, atol=0)
    assert metrics()["versions_adopted"] > 0


@both
def test_a_step_within_a_compiled_function_is_the_same_step(make):
    model, x, y = model_and_data()
    plain = copy.deepcopy(model)
    torch._dynamo.reset()
    optimizer, metrics = make(model)
    reference, _ = make(plain)

    @torch.compile(backend="aot_eager")
    def step():
        optimizer.step()

    losses = [], []
    for _ in range(6):
        for of_loop, take, seen in ((model, step, losses[0]), (plain, reference.step, losses[1])):
            of_loop.zero_grad()
            loss = loss_of(of_loop, x, y)
            loss.backward()
            seen.append(loss.item())
            take()
    assert metrics()["step"] == 6
    assert metrics()["versions_adopted"] > 0
    # A compiled AdamW rounds otherwise; Shampoo's step is left as it is.
    torch.testing.assert_close(*losses, rtol=1e-2, atol=0)
    assert make is hooked or same_weights(model, plain)


@both
def test_a_closure_calls_the_compiled_model(make):
    """The step is left out of compilation, what it calls is not."""
    model, x, y = model_and_data()
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counting)
    optimizer, _ = make(model)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(compiled, x, y)
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > optimizer.step(closure).item()
    assert graphs


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="there is no compiler for it")
def test_a_model_compiled_for_the_machine():
    torch._dynamo.reset()
    model, x, y = model_and_data()
    compiled = torch.compile(model)
    optimizer, metrics = shampoo(compiled)
    losses = train(compiled, x, y, optimizer, 10)
    assert losses[-1] < losses[0]
    assert metrics()["versions_adopted"] > 0


@both
def test_a_learning_rate_that_is_a_tensor(make):
    by_number, x, y = model_and_data()
    by_tensor = copy.deepcopy(by_number)
    first, _ = make(by_number, lr=0.02)
    second, _ = make(by_tensor, lr=torch.tensor(0.02))
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in (first, second)]
    losses = []
    for _ in range(6):
        losses.append((train(by_number, x, y, first, 1)[0], train(by_tensor, x, y, second, 1)[0]))
        for scheduler in schedulers:
            scheduler.step()
    assert isinstance(second.param_groups[0]["lr"], torch.Tensor)
    assert float(second.param_groups[0]["lr"]) == pytest.approx(0.02 * 0.9**6)
    for by_number_loss, by_tensor_loss in losses:
        assert by_tensor_loss == pytest.approx(by_number_loss, rel=1e-4)
