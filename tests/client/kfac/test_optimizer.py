"""The optimizer against a float64 transcription, and what a layer without a version does."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

from kfac_models import Convolutional, Words, batch, loss_of, seeded, train
from numpy_kfac import NumpyKFAC
from preconditioner_client import (
    KFAC,
    BlockingConfig,
    LocalExchange,
    StalenessConfig,
    StatisticsConfig,
)

EVERY_STEP = StalenessConfig(refresh_every=1, max_staleness=1)


def kfac(model, **settings):
    defaults = {"service": LocalExchange(), "staleness": EVERY_STEP, "lr": 1e-2}
    return KFAC(model, **(defaults | settings))


def joined(module, of=lambda p: p):
    parts = [of(module.weight).detach().flatten(1)]
    if getattr(module, "bias", None) is not None:
        parts.append(of(module.bias).detach().unsqueeze(1))
    return torch.cat(parts, 1).double().numpy()


class Watched:
    """Factors of a module's batches, one example at a time."""

    def __init__(self, module):
        self._module = module
        module.register_forward_hook(self._after)

    def _after(self, module, inputs, output):
        a = inputs[0].detach()
        a = F.one_hot(a, module.num_embeddings) if isinstance(module, nn.Embedding) else a
        self.inputs = a.flatten(0, -2).double().numpy()
        output.register_hook(lambda g: setattr(self, "gradients", g.flatten(0, -2).double().numpy()))

    def factors(self):
        n = len(self.inputs)
        a, g = self.inputs, n * self.gradients
        if getattr(self._module, "bias", None) is not None:
            a = np.concatenate([a, np.ones((n, 1))], 1)
        return a.T @ a / n, g.T @ g / n


@pytest.mark.parametrize("split_groups", [False, True])
def test_twenty_steps_agree(split_groups):
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1, bias=False)))
    params = model.named_parameters()
    if split_groups:
        params = [{"params": [model[0].bias]}, {"params": [model[2].weight, model[0].weight]}]
    settings = {"lr": 0.02, "damping": 0.05, "momentum": 0.9, "weight_decay": 0.1}
    optimizer = kfac(model, params=params, statistics=StatisticsConfig(beta=0.8), **settings)
    layers = [model[0], model[2]]
    watched = [Watched(module) for module in layers]
    oracles = [NumpyKFAC(joined(module), beta=0.8, **settings) for module in layers]
    for step in range(20):
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(12, 6, generator=generator)
        optimizer.zero_grad()
        (model(inputs) - inputs.sum(1, keepdim=True)).square().mean().backward()
        for module, one, oracle in zip(layers, watched, oracles, strict=True):
            oracle.step(joined(module, lambda p: p.grad), *one.factors())
        optimizer.step()
        for module, oracle in zip(layers, oracles, strict=True):
            np.testing.assert_allclose(joined(module), oracle.w, rtol=2e-4, atol=2e-5)
    assert optimizer.metrics()["age_max"] == 0


def test_an_embedding_agrees_with_its_dense_form():
    model = seeded(Words)
    settings = {"lr": 0.05, "damping": 0.02, "momentum": 0.5, "weight_decay": 0.0}
    optimizer = kfac(model, statistics=StatisticsConfig(beta=0.7), **settings)
    watched = Watched(model.table)
    # The table is (V, width): its transpose is the matrix (out, in).
    oracle = NumpyKFAC(model.table.weight.detach().T.double().numpy(), beta=0.7, **settings)
    for step in range(10):
        optimizer.zero_grad()
        loss_of(model, *batch(model, step)).backward()
        oracle.step(model.table.weight.grad.T.double().numpy(), *watched.factors())
        optimizer.step()
        np.testing.assert_allclose(model.table.weight.detach().T, oracle.w, rtol=2e-4, atol=2e-5)


def test_a_long_side_is_cut_and_blocks_are_damped_each():
    model = seeded(lambda: nn.Linear(5, 3, bias=False))
    blocking = BlockingConfig(block_size=3)
    settings = {"lr": 0.02, "damping": 0.05, "momentum": 0.0, "weight_decay": 0.0}
    optimizer = kfac(model, blocking=blocking, statistics=StatisticsConfig(beta=0.0), **settings)
    watched = Watched(model)
    start = joined(model)
    inputs = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))
    model(inputs).square().sum(1).mean().backward()
    a, g = watched.factors()
    gradient = joined(model, lambda p: p.grad)
    optimizer.step()
    for columns in (slice(0, 3), slice(3, 5)):
        oracle = NumpyKFAC(start[:, columns], beta=0.0, **settings)
        oracle.step(gradient[:, columns], a[columns, columns], g)
        np.testing.assert_allclose(joined(model)[:, columns], oracle.w, rtol=1e-4, atol=1e-5)
    assert optimizer.metrics()["blocks"] == 2


@pytest.mark.parametrize("batch_norm", ["unit_wise", "diagonal", "none"])
def test_batch_norm_in_closed_form(batch_norm):
    model = seeded(Convolutional)
    optimizer = kfac(model, batch_norm=batch_norm, momentum=0.0, damping=0.3)
    norm = model[1]
    optimizer.zero_grad()
    seen = {}

    def after(module, inputs, output):
        # The activation that follows overwrites its input.
        seen["x"] = inputs[0].detach()
        output.register_hook(lambda g: seen.update(g=g))

    norm.register_forward_hook(after)
    loss_of(model, *batch(model, 0)).backward()
    before = torch.stack([norm.weight.detach(), norm.bias.detach()]).double()
    gradients = torch.stack([norm.weight.grad, norm.bias.grad]).double()
    optimizer.step()
    x, g = seen["x"].double(), 16 * seen["g"].double()
    scaled = (x - x.mean((0, 2, 3), keepdim=True)) / (
        x.var((0, 2, 3), unbiased=False, keepdim=True) + norm.eps
    ).sqrt()
    own = torch.stack([(g * scaled).sum((2, 3)), g.sum((2, 3))])  # (2, N, C)
    fisher = torch.einsum("inc,jnc->cij", own, own) / 16
    if batch_norm == "diagonal":
        fisher = fisher * torch.eye(2)
    damped = fisher + 0.3 * torch.eye(2, dtype=torch.float64)
    expected = gradients if batch_norm == "none" else torch.linalg.solve(damped, gradients.T).T
    after = torch.stack([norm.weight.detach(), norm.bias.detach()]).double()
    torch.testing.assert_close(after, before - 0.01 * expected, rtol=1e-4, atol=1e-6)


def test_without_a_version_the_step_is_that_of_sgd():
    model, other = seeded(Convolutional), seeded(Convolutional)
    late = StalenessConfig(refresh_every=5, max_staleness=50)
    optimizer = kfac(model, service=LocalExchange(delay=50), staleness=late, batch_norm="none")
    train(model, optimizer, range(6))
    train(other, torch.optim.SGD(other.parameters(), lr=1e-2, momentum=0.9), range(6))
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert optimizer.metrics()["blocks_with_version"] == 0


def test_factors_are_taken_only_when_they_are_due():
    model = seeded(Words)
    optimizer = kfac(model, statistics=StatisticsConfig(beta=0.9, every=3))
    layer = optimizer._layers.matrices[0]
    for step in range(1, 7):
        optimizer.zero_grad()
        loss_of(model, *batch(model, step)).backward()
        assert (layer.factors is not None) == (step % 3 == 0 or step == 1)
        optimizer.step()
        assert layer.factors is None
    assert optimizer.state_dict()["state"][1]["block.0:9,0:5.updates"] == 2


def test_gradients_do_not_outlive_their_step():
    model = seeded(Convolutional)
    optimizer = kfac(model)
    train(model, optimizer, range(2))
    gradients = [StorageWeakRef(parameter.grad.untyped_storage()) for parameter in model.parameters()]
    optimizer.zero_grad()
    assert all(gradient.expired() for gradient in gradients)


def test_bad_gradients_change_nothing_and_leave_nothing_behind():
    model = seeded(Words)
    optimizer = kfac(model)
    train(model, optimizer, range(2))
    kept = [p.detach().clone() for p in model.parameters()]
    loss = loss_of(model, *batch(model, 2)) * float("inf")
    optimizer.zero_grad()
    loss.backward()
    with pytest.raises(ValueError, match="NaN or infinite"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(kept, model.parameters(), strict=True))
    losses = train(model, optimizer, range(2, 10))
    assert np.isfinite(losses).all()
    assert optimizer.metrics()["refused"] == 0


def test_an_empty_batch_leaves_statistics_as_they_were():
    model = seeded(Convolutional).eval()
    optimizer = kfac(model)

    def step(size):
        optimizer.zero_grad()
        model(torch.ones(size, 1, 8, 8)).square().sum().backward()
        optimizer.step()
        states = optimizer.state_dict()["state"].values()
        return {
            (i, key): copy.deepcopy(value)
            for i, state in enumerate(states)
            for key, value in state.items()
            if ".statistics." in key or key.endswith((".updates", "diagonal_statistics"))
        }

    assert not any(torch.as_tensor(value).any() for value in step(0).values())
    before = step(4)
    after = step(0)
    assert before.keys() == after.keys()
    assert sum(bool(torch.as_tensor(value).any()) for value in before.values()) > 6
    for key, value in after.items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)
    assert optimizer.metrics()["refused"] == 0
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"damping": 0.0}, "damping must be finite and > 0, not 0.0"),
        ({"statistics": StatisticsConfig(accumulation="sum")}, "must be 'ema'"),
        ({"batch_norm": "full"}, "'unit_wise', 'diagonal', 'none', not 'full'"),
        ({"factor_dtype": torch.float64}, "factor_dtype must be"),
        ({"momentum": -1.0}, "momentum must be >= 0"),
        (
            {"params": [{"params": [nn.Parameter(torch.ones(2))], "momentum_of": "preconditioned"}]},
            "momentum_of='preconditioned' is Shampoo's",
        ),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        kfac(Words(), **settings)


def test_a_model_without_layers_is_refused():
    with pytest.raises(ValueError, match="LayerNorm has no layer that K-FAC knows"):
        kfac(nn.LayerNorm(3))


def test_close_takes_the_hooks_out():
    model = seeded(Words)
    optimizer = kfac(model)
    optimizer.close()
    loss_of(model, *batch(model, 0)).backward()
    assert optimizer._layers.matrices[0].factors is None


def test_a_constructor_that_fails_leaves_no_hooks():
    model = seeded(Words)
    with pytest.raises(ValueError, match="no_such_place"):
        KFAC(model, service="no_such_place")
    assert not any(module._forward_hooks for module in model.modules())


def test_some_layers_of_a_model_alone():
    """A BatchNorm that it was not given has no state, also not after it was looked for."""
    model = seeded(Convolutional)
    linear = [p for layer in model.modules() if isinstance(layer, nn.Linear) for p in layer.parameters()]
    optimizer = KFAC(
        model, linear, lr=1e-2, service=LocalExchange(), staleness=StalenessConfig(refresh_every=1)
    )
    images = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    loss_of(model, images, torch.arange(8) % 10).backward()
    optimizer.step()
    saved = optimizer.state_dict()
    assert len(saved["state"]) == len(linear)
    optimizer.load_state_dict(saved)


def digits_loss(make, steps=60, seed=0):
    """Training loss on digits after some steps."""
    images, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(images.astype(np.float32)).view(-1, 1, 8, 8).sub_(5).div_(6)
    labels = torch.from_numpy(labels)
    model = seeded(Convolutional, seed)
    optimizer = make(model)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(0, len(images), (64,), generator=generator)
        optimizer.zero_grad()
        loss_of(model, images[rows], labels[rows]).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        return float(loss_of(model, images, labels))


def test_it_beats_momentum_sgd_on_digits():
    ours = digits_loss(lambda model: kfac(model, lr=3e-3))
    rates = (3e-2, 1e-1)
    best = min(
        digits_loss(lambda model, lr=lr: torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9))
        for lr in rates
    )
    assert ours < best
