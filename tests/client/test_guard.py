"""Gradients that are not finite on an accelerator: the step has no effect, and the host learns it later.

There need be no accelerator: CPU tensors are treated as if they were one's.
"""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from guarded_training import SETTINGS, STALENESS, make_model, make_optimizer, set_gradients
from preconditioner_client import BlockingConfig, GraftingConfig, LocalExchange, attach
from preconditioner_client import engine as engine_module

every_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


@pytest.fixture
def deferred(monkeypatch):
    """Call it, and the CPU is taken for an accelerator from then on."""

    def begin():
        monkeypatch.setattr(engine_module, "is_deferred", lambda device: True)

    return begin


def contents(optimizer):
    """All tensors of the state, by parameter and key."""
    return {
        (index, key): value.clone()
        for index, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
        if torch.is_tensor(value) and "preconditioner" not in key
    }


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in SETTINGS),
        *((name, dtype) for name in ("momentum", "lamb") for dtype in (torch.bfloat16, torch.float64)),
    ],
)
def test_a_bad_step_leaves_statistics_moments_and_weights_as_they_were(deferred, name, dtype, caplog):
    deferred()
    model = make_model(dtype=dtype)
    optimizer = make_optimizer(model.named_parameters(), **SETTINGS[name])
    for step in range(6):
        set_gradients(model, step)
        optimizer.step()
    before, weights = contents(optimizer), [p.detach().clone() for p in model.parameters()]
    assert optimizer.metrics()["nonfinite_steps"] == 0
    caplog.set_level(logging.WARNING, "preconditioner_client")
    for step, value in enumerate((float("nan"), float("inf"), -float("inf"))):
        set_gradients(model, step)
        model[3].weight.grad[2, 1] = value
        optimizer.step()
        after = contents(optimizer)
        assert after.keys() == before.keys()
        for key, old in before.items():
            assert torch.equal(after[key], old), key
        for parameter, old in zip(model.parameters(), weights, strict=True):
            assert torch.equal(parameter, old)
    assert optimizer.metrics()["nonfinite_steps"] == 3
    assert [r.getMessage().split(".")[0] for r in caplog.records] == [
        "step 7 had no effect: the gradient of 3"
    ]
    set_gradients(model, 7)
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    assert not torch.equal(model[3].weight, weights[5])


@every_setting
def test_the_very_first_step_may_be_bad(deferred, settings):
    deferred()
    model = make_model()
    weights = [p.detach().clone() for p in model.parameters()]
    optimizer = make_optimizer(model.named_parameters(), **settings)
    set_gradients(model, 0)
    model[0].bias.grad[0] = float("nan")
    optimizer.step()
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    for step in range(4):
        set_gradients(model, step)
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


@every_setting
def test_good_steps_are_those_of_the_cpu_but_for_rounding(deferred, settings):
    models = []
    for forced in (False, True):
        if forced:
            deferred()
        model = make_model()
        optimizer = make_optimizer(model.named_parameters(), **settings)
        for step in range(12):
            set_gradients(model, step, without={1, 2} if step % 3 == 2 else ())
            optimizer.step()
        assert optimizer.metrics()["versions_adopted"] > 0
        models.append(model)
    for parameter, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-3, atol=1e-5)


def test_an_attached_preconditioner_hands_on_zeros(deferred):
    deferred()
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = attach(
        optimizer,
        model,
        grafting=GraftingConfig(),
        blocking=BlockingConfig(block_size=8),
        staleness=STALENESS,
        service=LocalExchange(1),
    )
    for step in range(5):
        set_gradients(model, step)
        optimizer.step()
    weights = [p.detach().clone() for p in model.parameters()]
    set_gradients(model, 5)
    model[1].weight.grad[0, 0] = float("inf")
    optimizer.step()
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    assert handle.metrics()["nonfinite_steps"] == 1


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_groups_left_alone_take_part_in_a_bad_step_and_in_no_other(deferred, bad):
    """Half of a step is worse than none, whichever gradient is bad."""
    deferred()
    torch.manual_seed(0)
    table, layer = nn.Embedding(6, 4, sparse=True), nn.Linear(4, 8, bias=False)
    wave = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    parameters = table.weight, layer.weight, wave
    optimizer = torch.optim.SGD([{"params": [p]} for p in parameters], lr=0.1)
    handle = attach(
        optimizer,
        grafting=GraftingConfig(),
        groups={0: None, 2: None},
        staleness=STALENESS,
        service=LocalExchange(1),
    )
    # After the preconditioner's hook, and before the optimizer.
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append([p.grad.to_dense().clone() for p in parameters]))

    def backward(step):
        optimizer.zero_grad()
        loss = layer(table(torch.tensor([step % 6, 5]))).square().sum() + wave.abs().square().sum()
        loss.backward()
        return [p.grad.to_dense().clone() for p in parameters]

    for step in range(5):
        given = backward(step)
        optimizer.step()
        assert [torch.equal(a, b) for a, b in zip(seen[-1], given, strict=True)] == [True, False, True]
    weights = [p.detach().clone() for p in parameters]
    backward(5)
    gradient = parameters[bad].grad
    (gradient._values() if gradient.is_sparse else gradient)[0] = float("nan")
    optimizer.step()
    assert not any(bool(gradient.any()) for gradient in seen[-1])
    assert all(torch.equal(p, w) for p, w in zip(parameters, weights, strict=True))
    assert handle.metrics()["nonfinite_steps"] == 1


def test_a_scaler_s_verdict_on_a_fused_optimizer_is_taken_over(deferred):
    """GradScaler calls a fused optimizer in any case, and leaves the verdict with it."""
    deferred()
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    handle = attach(optimizer, model, staleness=STALENESS, service=LocalExchange(1))
    set_gradients(model, 0)
    optimizer.step()
    before = {k: v for s in handle.state_dict()["state"] for k, v in s.items() if "statistics" in k}
    weights = [p.detach().clone() for p in model.parameters()]
    set_gradients(model, 1)
    optimizer.grad_scale, optimizer.found_inf = None, torch.ones(())
    optimizer.step()
    after = {k: v for s in handle.state_dict()["state"] for k, v in s.items() if "statistics" in k}
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
