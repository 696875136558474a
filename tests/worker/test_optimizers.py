"""Settings reach the optimizers that they build, and come back from JSON as what they were."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter, ValidationError
from torch import nn

from preconditioner_client import LocalExchange
from preconditioner_worker.optimizers import OPTIMIZERS, AnyOptimizer, ShampooSettings


def test_settings_come_back_from_json_as_their_own_class():
    adapter = TypeAdapter(AnyOptimizer)
    for name, kind in OPTIMIZERS.items():
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
    for kind in OPTIMIZERS.values():
        with pytest.raises(ValidationError):
            kind(**bad)
