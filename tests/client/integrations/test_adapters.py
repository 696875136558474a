"""The adapters by themselves; what they do inside of the frameworks is tested with these."""

from __future__ import annotations

import importlib
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from preconditioner_client import LocalExchange, Shampoo, StalenessConfig, attach
from preconditioner_client.adapters import (
    hf_callback,
    lightning_callback,
    log_to_tensorboard,
    metrics_source,
    report_first,
    scalars,
)

FRESH = StalenessConfig(refresh_every=1, max_staleness=5)


def trained(steps=4, attached=False):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    if attached:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        attach(optimizer, model, staleness=FRESH, service=LocalExchange())
    else:
        optimizer = Shampoo(model.named_parameters(), lr=0.1, staleness=FRESH, service=LocalExchange())
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
    return model, optimizer


def test_importing_the_adapters_imports_no_framework():
    frameworks = "('tensorboard', 'transformers', 'accelerate', 'lightning', 'pytorch_lightning')"
    program = (
        f"import sys, preconditioner_client.adapters; print([m for m in {frameworks} if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "[]", result.stderr


@pytest.mark.parametrize("attached", [False, True])
def test_scalars_are_floats_under_one_prefix(attached):
    _, optimizer = trained(attached=attached)
    metrics = metrics_source(optimizer).metrics()
    values = scalars(metrics)
    assert all(name.startswith("preconditioner/") for name in values)
    assert {type(value) for value in values.values()} == {float}
    assert values["preconditioner/step"] == 4.0
    assert values["preconditioner/versions_adopted"] == metrics["versions_adopted"] > 0
    assert values["preconditioner/ages_max"] == max(metrics["ages"])
    assert values["preconditioner/breaker_open"] == 0.0
    assert "preconditioner/epoch" not in values


def test_what_has_no_value_yet_is_left_out():
    assert scalars({"age": None, "ages": [], "step": 0, "name": "x"}, prefix="") == {"step": 0.0}


def test_wrappers_are_looked_through():
    _, optimizer = trained()
    wrapped = SimpleNamespace(optimizer=SimpleNamespace(optimizer=optimizer))
    assert metrics_source(wrapped) is optimizer
    _, hooked = trained(attached=True)
    assert metrics_source(SimpleNamespace(optimizer=hooked)).metrics()["step"] == 4


def test_an_optimizer_without_a_preconditioner_is_named():
    with pytest.raises(ValueError, match="Adam has no preconditioner"):
        metrics_source(torch.optim.Adam([nn.Parameter(torch.ones(1))]))


def test_tensorboard_gets_every_scalar():
    written = {}
    writer = SimpleNamespace(add_scalar=lambda tag, value, step: written.update({tag: (value, step)}))
    _, optimizer = trained()
    log_to_tensorboard(writer, optimizer, 17, prefix="p/")
    assert written == {k: (v, 17) for k, v in scalars(optimizer.metrics(), "p/").items()}


def test_the_hugging_face_callback_adds_to_logs_of_training_only():
    from transformers import TrainerCallback, TrainerControl, TrainerState

    _, optimizer = trained()
    callback = hf_callback(optimizer)
    assert isinstance(callback, TrainerCallback)
    state = TrainerState(global_step=4)
    for logs, reached in [
        ({"loss": 1.0}, True),
        ({"eval_loss": 1.0}, False),
        ({"train_runtime": 1.0}, False),
    ]:
        state.log_history.append({**logs, "step": 4})
        callback.on_log(None, state, TrainerControl(), logs=logs, optimizer=None)
        assert ("preconditioner/age" in logs) == reached
        assert ("preconditioner/age" in state.log_history[-1]) == reached


def test_reporters_come_after_a_callback_that_reports_first():
    handler = SimpleNamespace(callbacks=["flow", "reporter"])
    trainer = SimpleNamespace(callback_handler=handler, add_callback=handler.callbacks.append)
    report_first(trainer, "ours")
    assert handler.callbacks == ["flow", "ours", "reporter"]


@pytest.mark.parametrize("library", ["lightning.pytorch", "pytorch_lightning"])
def test_the_lightning_callback_is_of_the_library_in_use(library, monkeypatch):
    module = importlib.import_module(library)
    for other in ("lightning.pytorch", "pytorch_lightning"):
        if other != library:
            monkeypatch.delitem(sys.modules, other, raising=False)
    assert isinstance(lightning_callback(), module.Callback)
