"""Training loops as people write them: scaled and accumulated losses, checkpointed activations, closures."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kfac_models import Words, batch, loss_of, seeded, train
from preconditioner_client import KFAC, LocalExchange, StalenessConfig, StatisticsConfig

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


MISSED = "K-FAC's hooks were not called for "


def warnings_of(caplog):
    """Messages; torch's compiler logs there as well."""
    return [r.getMessage() for r in caplog.records if r.name == "preconditioner_client"]


def compiled_after_it_ran():
    """A model that K-FAC does not see into, since it was compiled and has run before."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(5)))
    compiled = torch.compile(model, backend="eager")
    compiled(torch.randn(4, 3)).square().mean().backward()
    return compiled, make(model)


def steps_of(optimizer, loss, count=3):
    for _ in range(count):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return optimizer.metrics()


def test_hooks_that_compiled_code_does_not_know_are_missed_with_one_warning(caplog):
    model, optimizer = compiled_after_it_ran()
    inputs = torch.randn(4, 3)
    metrics = steps_of(optimizer, lambda: model(inputs).square().mean())
    assert metrics["blocks_with_version"] == 0
    [message] = warnings_of(caplog)
    assert message.startswith(MISSED + "0, 1, 2 and 2 more, which had gradients")
    # The way out that it names is one.
    torch.compiler.reset()
    metrics = steps_of(optimizer, lambda: model(inputs).square().mean())
    assert metrics["blocks_with_version"] == metrics["blocks"] == 5
    assert len(warnings_of(caplog)) == 1


def test_a_weight_that_is_used_without_its_module_is_missed_with_one_warning(caplog):
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    inputs = torch.randn(4, 3, 8)
    steps_of(make(model), lambda: model(inputs).square().mean())
    [message] = warnings_of(caplog)
    assert message.startswith(MISSED + "self_attn.out_proj, which had gradients")
    # Not if it is nothing of K-FAC's.
    others = [p for name, p in model.named_parameters() if "out_proj" not in name]
    steps_of(make(model, params=others), lambda: model(inputs).square().mean())
    assert len(warnings_of(caplog)) == 1


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("to_none", [True, False])
def test_layers_that_are_not_used_or_not_due_are_not_warned_of(every, to_none, caplog):
    """Among them one that is never used, one only in odd steps, and one in half of the accumulated parts."""
    model = seeded(lambda: nn.ModuleList(nn.Linear(3, 3) for _ in range(4)))
    # As others may have left them.
    for parameter in model.parameters():
        parameter.grad = None if to_none else torch.zeros_like(parameter)
    optimizer = make(model, statistics=StatisticsConfig(beta=0.9, every=every))
    inputs = torch.randn(8, 3)
    for step in range(8):
        optimizer.zero_grad(set_to_none=to_none)
        for part in range(2):
            outputs = model[0](inputs)
            outputs = model[1](outputs) if step % 2 else outputs
            outputs = model[2](outputs) if part else outputs
            (outputs.square().mean() / 2).backward()
        optimizer.step()
    assert optimizer.metrics()["blocks_with_version"] == 3
    assert not warnings_of(caplog)


def test_checkpointed_or_skipped_layers_are_not_warned_of(caplog):
    model = seeded(Words)
    optimizer = make(model, grad_scale=lambda: 1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(4):
        optimizer.zero_grad()
        inputs, targets = batch(model, step)
        hidden = model.table(inputs) + model.offset
        outputs = checkpoint(model.output, hidden, use_reentrant=True)
        loss = F.cross_entropy(outputs.flatten(0, 1), targets.flatten())
        scaler.scale(loss * (float("inf") if step == 0 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.metrics()["blocks_with_version"] == 2
    assert not warnings_of(caplog)


def test_a_copy_is_refused_with_what_to_do_instead():
    with pytest.raises(TypeError, match="a KFAC optimizer holds a connection"):
        copy.deepcopy(make(Words()))
