"""The formula of K-FAC's memory, held against the storages that are alive in real steps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kfac_models import Convolutional, Dense, Words, batch, loss_of, seeded
from live_tensors import Waiting, assert_is_bound, peaks_of_training
from preconditioner_client import (
    KFAC,
    AdaptiveRefresh,
    BlockingConfig,
    DistributedConfig,
    GraftingConfig,
    LocalExchange,
    StalenessConfig,
)


def dense():
    return Dense(256, 300)


def convolutional():
    return Convolutional(channels=16)


def words():
    """A table that is larger than all else."""
    return Words(vocabulary=2000, width=64, classes=100)


class Normalised(nn.Module):
    """More BatchNorm than all else."""

    def __init__(self):
        super().__init__()
        self.norms = nn.Sequential(nn.BatchNorm1d(64 * 64), nn.BatchNorm1d(64 * 64))
        self.output = nn.Linear(64, 10)

    def forward(self, images):
        wide = images.to(self.output.weight.dtype).flatten(1).repeat(1, 64)
        return self.output(self.norms(wide).unflatten(1, (64, 64)).mean(1))


MODELS = [dense, convolutional, words]
SETTINGS = {
    "default": {},
    "without momentum": {"momentum": 0.0},
    "adaptive refresh": {"adaptive_refresh": AdaptiveRefresh(similar_below=10.0)},
    "adaptive refresh of many blocks": {
        "adaptive_refresh": AdaptiveRefresh(),
        "blocking": BlockingConfig(block_size=64),
        "staleness": StalenessConfig(refresh_every=1),
    },
    "a schedule": {
        "staleness": StalenessConfig(refresh_every=2, adoption="scheduled", delay=2, stagger=False)
    },
    "whole layers": {"blocking": BlockingConfig()},
    "adam": {"grafting": GraftingConfig(method="adam")},
    "sgd, blended, nesterov": {"grafting": GraftingConfig(method="sgd", blend_steps=50), "nesterov": True},
    "all that changes gradients": {
        "maximize": True,
        "weight_decay": 0.1,
        "decoupled_weight_decay": False,
    },
}


def kfac(model, params=None, **settings):
    defaults = {
        "lr": 1e-5,
        "blocking": BlockingConfig(block_size=128),
        "staleness": StalenessConfig(refresh_every=2, stagger=False),
        "service": Waiting(),
    }
    return KFAC(model, params, **(defaults | settings))


def peaks_of(model, optimizer, **how):
    examples = batch(model, 0, size=2)
    return peaks_of_training(model, optimizer, lambda: loss_of(model, *examples).backward(), examples, **how)


def assert_estimate_is_bound(optimizer, peaks):
    assert_is_bound(optimizer.estimate_memory(), *peaks)
    assert optimizer.metrics()["versions_adopted"] > 0


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("make", MODELS)
def test_the_formula_is_a_bound_and_no_loose_one(make, settings):
    model = seeded(make)
    optimizer = kfac(model, **settings)
    assert_estimate_is_bound(optimizer, peaks_of(model, optimizer))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("method", ["none", "lamb"])
def test_other_dtypes(method, dtype):
    model = seeded(dense).to(dtype)
    optimizer = kfac(model, grafting=GraftingConfig(method=method), weight_decay=0.1)
    assert_estimate_is_bound(optimizer, peaks_of(model, optimizer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_is_inverted_here(dtype):
    model = seeded(Normalised).to(dtype)
    optimizer = kfac(model)
    # Activations are larger than all that is recorded of them.
    assert_estimate_is_bound(optimizer, peaks_of(model, optimizer, during_backward=False))


def test_some_layers_of_a_model():
    """Before the first step hooks do not know which."""
    model = seeded(dense)
    optimizer = kfac(model, [model[1].weight, model[3].weight, model[3].bias])
    assert_estimate_is_bound(optimizer, peaks_of(model, optimizer))


@pytest.mark.parametrize("make", [dense, convolutional, words, Normalised])
def test_what_is_recorded_does_not_depend_on_batches(make):
    model = seeded(make)
    optimizer = kfac(model)
    for step, size in enumerate((2, 16, 3)):
        loss_of(model, *batch(model, step, size)).backward()
        layers = optimizer._layers
        kept = [side for layer in layers.matrices for side in (layer.factors.output, layer.factors.input)]
        kept += [layer.fisher[1] for layer in layers.batch_norms]
        assert sum(side.nbytes for side in kept) == optimizer.estimate_memory().recorded


def test_a_second_batch_of_a_layer_is_beside_the_first():
    """A side that is cut into many has small statistics, and large factors until then."""
    model = seeded(lambda: Dense(1000, classes=10))
    optimizer = kfac(model, blocking=BlockingConfig(block_size=16), momentum=0.0)
    estimate = optimizer.estimate_memory()
    assert estimate.temporaries == pytest.approx(4 * (1000**2 + 65**2), rel=0.03)
    peak, _ = peaks_of(model, optimizer, passes=2)
    expected = estimate.total - estimate.in_flight
    # Copies of two examples' values at all layers, and what autograd has of them.
    assert peak <= expected + 2 * 16 * (64 + 1000 + 10)
    assert expected <= 1.3 * peak


@pytest.mark.parametrize("overlap", [False, True])
def test_what_several_replicas_own_is_what_one_owns(overlap):
    distributed = DistributedConfig(communication_dtype=torch.bfloat16, overlap=overlap, bucket_bytes=4096)
    with torch.device("meta"):
        model = words()
    optimizer = kfac(
        model,
        service=LocalExchange(),
        distributed=distributed,
        adaptive_refresh=AdaptiveRefresh(),
        factor_dtype=torch.bfloat16,
    )
    whole = optimizer.estimate_memory(replicas=1)
    parts = [optimizer.estimate_memory(replicas=4, replica=replica) for replica in range(4)]
    for field in ("statistics", "preconditioners", "compared", "outbox"):
        assert sum(getattr(part, field) for part in parts) == getattr(whole, field) > 0
    for field in ("moments", "diagonals", "recorded", "triangles"):
        assert {getattr(part, field) for part in parts} == {getattr(whole, field)}
    assert (whole.factor_buffers, whole.gather_buffers) == (0, 0)
    # One replica has the table's factor, one the two of the other layer.
    values = [64 * 65 // 2, 100 * 101 // 2 + 65 * 66 // 2]
    buffers = {part.factor_buffers for part in parts}
    assert len(buffers) == 1
    assert 2 * 4 * 2 * max(values) <= buffers.pop() <= 2 * 4 * (2 * max(values) + 32)


def test_a_model_that_does_not_fit_here():
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(8192, 8192, bias=False) for _ in range(200)))
    optimizer = KFAC(model, service=LocalExchange())
    estimate = optimizer.estimate_memory(replicas=64, replica=63)
    elements = 200 * 8192**2
    assert estimate.moments == 4 * elements
    assert estimate.statistics == pytest.approx(8 * elements / 64, rel=0.1)
    assert estimate.recorded == 8 * elements
    assert estimate.total == estimate.device + estimate.host
    assert (
        estimate.persistent + estimate.recorded + estimate.temporaries + estimate.arrivals == estimate.device
    )


def test_a_replica_that_is_none():
    with pytest.raises(ValueError, match=r"replica must be in \[0, 2\), not 2"):
        kfac(seeded(words)).estimate_memory(replicas=2, replica=2)
