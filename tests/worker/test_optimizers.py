"""Settings reach the optimizers that they build, and come back from JSON as what they were."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from preconditioner_client import LocalExchange
from preconditioner_worker.commands import Compare
from preconditioner_worker.contenders import (
    CONTENDERS,
    AnyContender,
    ContenderName,
    KFACSettings,
    LAMBSettings,
    LARSSettings,
    Shampoo2020Settings,
    SynchronousShampooSettings,
)
from preconditioner_worker.optimizers import ShampooSettings


def test_settings_come_back_from_json_as_their_own_class():
    adapter = TypeAdapter(AnyContender)
    for name, kind in CONTENDERS.items():
        settings = kind(lr=0.5)
        assert settings.name == name
        back = adapter.validate_json(settings.model_dump_json())
        assert type(back) is kind
        assert back == settings


def test_shampoos_flattened_settings_reach_its_configs():
    settings = ShampooSettings(
        lr=0.1, beta1=0.8, grafting="sgd", accumulation="sum", ridge="trace", ridge_value=1e-3, exponent=0.5,
        block_size=64, max_side=100, refresh_every=7, max_staleness=30, policy="graft", service="local:4",
        weight_decay=0.2,
    )  # fmt: skip
    optimizer = settings.build(nn.Linear(3, 2))
    group = optimizer.param_groups[0]
    assert (group["lr"], group["beta1"], group["weight_decay"]) == (0.1, 0.8, 0.2)
    assert group["grafting"].method.value == "sgd"
    assert group["statistics"].accumulation.value == "sum"
    assert (group["root"].ridge.kind.value, group["root"].ridge.value) == ("trace", 1e-3)
    assert group["root"].exponent == 0.5
    assert (group["blocking"].block_size, group["blocking"].max_side) == (64, 100)
    assert optimizer.metrics()["max_staleness"] == 30
    optimizer.close()


def test_local_services_are_exchanges_of_that_delay(monkeypatch):
    made: list[int] = []
    original = LocalExchange.__init__
    monkeypatch.setattr(
        LocalExchange, "__init__", lambda self, delay=0: made.append(delay) or original(self, delay)
    )
    ShampooSettings(service="local:12").build(nn.Linear(3, 2)).close()
    assert made == [12]


@pytest.mark.parametrize("bad", [{"lr": 0}, {"lr": float("inf")}, {"beta1": 1.0}, {"momentun": 0.9}])
def test_settings_that_cannot_be_are_refused(bad):
    for kind in CONTENDERS.values():
        with pytest.raises(ValidationError):
            kind(**bad)


def test_every_contender_has_options_of_its_name():
    assert list(CONTENDERS) == list(get_args(ContenderName))
    for name in CONTENDERS:
        assert isinstance(Compare.model_fields[name.replace("-", "_")].default, CONTENDERS[name])


def test_shampoo_of_2020_is_as_published():
    settings = Shampoo2020Settings(lr=0.2, momentum=0.8, blend_steps=7, service="local:2")
    optimizer = settings.build(nn.Linear(3, 2))
    group = optimizer.param_groups[0]
    assert (group["lr"], group["beta1"], group["momentum"], group["dampening"]) == (0.2, 0.0, 0.8, 0.8)
    assert group["statistics"].accumulation.value == "sum"
    assert (group["grafting"].method.value, group["grafting"].blend_steps) == ("adagrad", 7)
    assert (group["root"].root_order(2), group["root"].root_order(1)) == (4, 2)
    optimizer.close()


def test_synchronous_shampoo_has_its_roots_in_the_step_of_their_snapshot():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 3, bias=False))
    optimizer = SynchronousShampooSettings(refresh_every=5).build(model)
    for _ in range(12):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    metrics = optimizer.metrics()
    assert metrics["waits"] == 0
    assert metrics["age_max"] == 4  # 0 in the step of a refresh
    assert metrics["versions_adopted"] == 4  # of both matrices, at steps 5 and 10
    optimizer.close()


@pytest.mark.parametrize("adaptive", [False, True])
def test_kfac_refreshes_less_often_while_factors_stay_the_same_if_asked_to(adaptive):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = KFACSettings(lr=1e-6, refresh_every=2, adaptive_refresh=adaptive, service="local:1").build(
        model
    )
    x = torch.randn(32, 4)
    for _ in range(40):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    sent = optimizer.metrics()["snapshots_sent"]
    optimizer.close()
    assert sent == 20 if not adaptive else 2 <= sent <= 8


def test_layerwise_methods_leave_biases_and_gains_alone():
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    for settings in (LARSSettings(), LAMBSettings()):
        matrices, rest = settings.build(model).param_groups
        assert (matrices["trust_ratio"], rest["trust_ratio"], rest["weight_decay"]) == (True, False, 0.0)
