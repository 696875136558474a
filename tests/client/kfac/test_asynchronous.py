"""K-FAC through an exchange: delays, the bound, and checkpoints."""

from __future__ import annotations

import io

import pytest
import torch

from kfac_models import Convolutional, Words, seeded, train
from preconditioner_client import KFAC, LocalExchange, StalenessConfig
from preconditioner_client.adapters import metrics_source

SCHEDULED = StalenessConfig(refresh_every=3, adoption="scheduled", delay=4, max_staleness=10)


def make(model, **settings):
    defaults = {"service": LocalExchange(2), "staleness": SCHEDULED, "momentum": 0.5}
    return KFAC(model, **(defaults | settings))


def test_versions_are_adopted_on_their_schedule():
    model = seeded(Words)
    optimizer = make(model)
    train(model, optimizer, range(20))
    metrics = optimizer.metrics()
    assert metrics["blocks_with_version"] == metrics["blocks"] == 2
    assert set(metrics["ages"]) == {4}
    assert metrics["age_max"] == 6
    assert metrics["late_adoptions"] == metrics["waits"] == 0
    assert metrics["layers"] == 2
    assert metrics_source(optimizer) is optimizer


def test_beyond_the_bound_the_step_is_the_gradients():
    model = seeded(Words)
    policy = StalenessConfig(refresh_every=3, max_staleness=4, policy="graft")
    optimizer = make(model, service=LocalExchange(8), staleness=policy)
    train(model, optimizer, range(30))
    metrics = optimizer.metrics()
    assert metrics["blocks_grafted_stale"] > 0
    assert metrics["age_max"] <= 4


@pytest.mark.parametrize("kind", [Words, Convolutional])
def test_a_resumed_run_is_the_uninterrupted_one(kind):
    model = seeded(kind)
    optimizer = make(model)
    train(model, optimizer, range(11))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, range(11, 20))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = seeded(kind, seed=1)
    resumed.load_state_dict(saved["model"])
    other = make(resumed)
    other.load_state_dict(saved["optimizer"])
    train(resumed, other, range(11, 20))
    for ours, theirs in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_checkpoint_of_another_model_is_refused():
    optimizer = make(seeded(Words))
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match=r"table.weight: diagonal_statistics has shape \(3,\)"):
        state["state"] = {1: {"step": 1, "diagonal_statistics": torch.zeros(3)} | blank_block()}
        optimizer.load_state_dict(state)


def blank_block():
    numbers = dict.fromkeys(("updates", "version", "first_adopted", "last_snapshot"), 0)
    matrices = {"statistics.0": torch.zeros(5, 5), "preconditioner.0": torch.zeros(5, 5)}
    return {f"block.0:9,0:5.{key}": value for key, value in (numbers | matrices).items()}


def test_a_model_moved_to_another_dtype_before_the_first_step_trains():
    model = seeded(Words)
    optimizer = make(model)
    optimizer.state_dict()
    model.to(torch.bfloat16)
    losses = train(model, optimizer, range(8))
    assert all(loss == loss for loss in losses)
    assert optimizer.metrics()["blocks_with_version"] == 2
