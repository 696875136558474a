"""The loop: the same run twice, ages and versions, divergence recorded."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console
from torch import nn

from preconditioner_client import LocalExchange, Shampoo
from preconditioner_worker.contenders import CONTENDERS
from preconditioner_worker.optimizers import SGDSettings, ShampooSettings
from preconditioner_worker.results import RunSettings
from preconditioner_worker.training import train
from preconditioner_worker.workloads import open_workload

WORKLOAD = open_workload("digits")


def settings(optimizer, steps=20, **changes):
    return RunSettings(
        label=optimizer.name,
        workload="digits",
        optimizer=optimizer,
        steps=steps,
        evaluate_every=10,
        **changes,
    )


@pytest.mark.parametrize("name", CONTENDERS)
def test_every_optimizer_learns_and_repeats_itself(name):
    optimizer = CONTENDERS[name]()
    if hasattr(optimizer, "service"):
        optimizer = optimizer.model_copy(update={"service": "local:3"})
    first, second = (train(WORKLOAD, settings(optimizer, 30)) for _ in range(2))
    assert first.steps.loss == second.steps.loss
    assert [point.step for point in first.evaluations] == [10, 20, 30]
    assert first.final_loss < first.evaluations[0].loss < 2.4
    assert len(first.steps.seconds) == len(first.steps.age) == 30
    assert all(0 < o <= s for o, s in zip(first.steps.optimizer_seconds, first.steps.seconds, strict=True))


@pytest.mark.parametrize("name", ["shampoo", "adamw-attached", "sgd-attached"])
def test_ages_and_versions_are_recorded(name):
    optimizer = CONTENDERS[name](service="local:3", refresh_every=5, max_staleness=20)
    run = train(WORKLOAD, settings(optimizer, 30))
    assert run.steps.age[0] is None
    ages = [age for age in run.steps.age if age is not None]
    assert max(ages) == run.metrics["age_max"] <= 20
    assert run.steps.versions[-1] == run.metrics["versions_adopted"] > 0
    assert run.metrics["waits"] == 0


def test_other_optimizers_have_no_age():
    run = train(WORKLOAD, settings(CONTENDERS["adamw"](), 3))
    assert run.steps.age == [None] * 3
    assert run.metrics == {}
    assert run.evaluations[-1].step == 3


@pytest.mark.parametrize(
    "optimizer", [SGDSettings(lr=1e6), ShampooSettings(lr=1e8, grafting="none", service="local:1")]
)
def test_divergence_is_recorded_and_ends_the_run(optimizer):
    run = train(WORKLOAD, settings(optimizer, 500))
    assert run.diverged
    assert len(run.steps.loss) < 500


def test_errors_of_the_user_are_not_taken_for_divergence(monkeypatch):
    def refuse(self, closure=None):
        raise ValueError("something else")

    monkeypatch.setattr(torch.optim.AdamW, "step", refuse)
    with pytest.raises(ValueError, match="something else"):
        train(WORKLOAD, settings(CONTENDERS["adamw"]()))


def test_weight_decay_spares_gains_and_biases():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.LayerNorm(4))
    decayed, spared = SGDSettings(weight_decay=0.1).groups(model)
    assert [p.ndim for p in decayed["params"]] == [4]
    assert [p.ndim for p in spared["params"]] == [1, 1, 1]
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_loss_time_age_and_versions(terminal):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=150)
    train(WORKLOAD, settings(ShampooSettings(service="local:2"), 20), console=console)
    text = out.getvalue()
    assert "20/20" in text
    for word in ("loss", "held-out", "ms", "age", "versions"):
        assert word in text


def test_a_run_waits_for_its_service_once_and_then_goes_on_without(caplog):
    class Deaf(LocalExchange):
        def counters(self):
            return {**super().counters(), "connected": 0}

    class Settings(ShampooSettings):
        def build(self, model):
            return Shampoo(self.groups(model), lr=self.lr, service=Deaf())

    run = settings(ShampooSettings(), 3)
    run = run.model_copy(update={"optimizer": Settings(), "service_wait": 1.0})
    with caplog.at_level("WARNING"):
        result = train(WORKLOAD, run)
    assert 1.0 <= result.service_seconds < 2
    assert caplog.text.count("going on without") == 1
    assert len(result.steps.loss) == 3
    assert sum(result.steps.seconds) < 1.0, "no step waits again"
