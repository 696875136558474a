"""LARS and LAMB against their papers' equations, written out in NumPy with float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from preconditioner_worker.rivals import LAMB, LARS

STEPS = 6
SHAPES = {"matrix": (4, 3), "kernel": (2, 3, 3, 3), "zero": (3, 3), "still": (2, 2), "bias": (5,)}


def trajectory(optimizer_class, lr=0.1, excluded_decay=0.0, **settings):
    """First weights, the gradients of every step, and the weights after each."""
    generator = np.random.default_rng(5)
    weights = {name: generator.normal(size=shape) for name, shape in SHAPES.items()}
    weights["zero"][:] = 0  # its norm is 0 at first
    parameters = {name: nn.Parameter(torch.tensor(w)) for name, w in weights.items()}
    groups = [
        {"params": [p for name, p in parameters.items() if name != "bias"]},
        {"params": [parameters["bias"]], "trust_ratio": False, "weight_decay": excluded_decay},
    ]
    optimizer = optimizer_class(groups, lr=lr, **settings)
    gradients = [
        {name: (0 if name == "still" else 1) * generator.normal(size=shape) for name, shape in SHAPES.items()}
        for _ in range(STEPS)
    ]
    seen = []
    for gradient in gradients:
        for name, parameter in parameters.items():
            parameter.grad = torch.tensor(gradient[name])
        optimizer.step()
        seen.append({name: p.detach().numpy().copy() for name, p in parameters.items()})
    return weights, gradients, seen


def norm(x):
    return np.sqrt((x * x).sum())


def quotient(a, b):
    return a / b if a > 0 and b > 0 else 1.0


@pytest.mark.parametrize("excluded_decay", [0.0, 0.1])
def test_lars_is_its_paper(excluded_decay):
    lr, momentum, decay, eta = 0.5, 0.8, 0.05, 0.02
    weights, gradients, seen = trajectory(
        LARS, lr, excluded_decay, momentum=momentum, weight_decay=decay, trust_coefficient=eta
    )
    velocity = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for gradient, after in zip(gradients, seen, strict=True):
        for name, g in gradient.items():
            w = weights[name]
            beta = excluded_decay if name == "bias" else decay
            local = 1.0 if name == "bias" else quotient(eta * norm(w), norm(g) + beta * norm(w))
            velocity[name] = momentum * velocity[name] + lr * local * (g + beta * w)
            weights[name] = w - velocity[name]
            np.testing.assert_allclose(after[name], weights[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("excluded_decay", [0.0, 0.1])
def test_lamb_is_its_paper(excluded_decay):
    lr, beta1, beta2, epsilon, decay = 0.1, 0.7, 0.95, 1e-3, 0.2
    weights, gradients, seen = trajectory(
        LAMB, lr, excluded_decay, beta1=beta1, beta2=beta2, epsilon=epsilon, weight_decay=decay
    )
    m = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    v = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for t, (gradient, after) in enumerate(zip(gradients, seen, strict=True), start=1):
        for name, g in gradient.items():
            w = weights[name]
            m[name] = beta1 * m[name] + (1 - beta1) * g
            v[name] = beta2 * v[name] + (1 - beta2) * g * g
            r = m[name] / (1 - beta1**t) / (np.sqrt(v[name] / (1 - beta2**t)) + epsilon)
            r = r + (excluded_decay if name == "bias" else decay) * w
            ratio = 1.0 if name == "bias" else quotient(norm(w), norm(r))
            weights[name] = w - lr * ratio * r
            np.testing.assert_allclose(after[name], weights[name], rtol=1e-12, atol=1e-14)


def test_lars_has_the_decay_in_its_denominator():
    weight = nn.Parameter(torch.tensor([[3.0, 4.0]]))
    weight.grad = torch.tensor([[0.6, 0.8]])
    LARS([weight], lr=1.0, momentum=0.0, weight_decay=0.5, trust_coefficient=0.1).step()
    # l = 0.1 * 5 / (1 + 2.5); without the decay it were 0.5.
    expected = torch.tensor([[3.0, 4.0]]) - 0.5 / 3.5 * torch.tensor([[2.1, 2.8]])
    torch.testing.assert_close(weight.detach(), expected)


def test_lamb_steps_by_the_length_of_the_weights_however_long():
    weight = nn.Parameter(torch.full((30, 30), 2.0))  # of norm 60, beyond the 10 of a known wrong copy
    weight.grad = torch.randn(30, 30)
    before = weight.detach().clone()
    LAMB([weight], lr=0.01, weight_decay=0.3).step()
    assert (weight.detach() - before).norm().item() == pytest.approx(0.6, rel=1e-5)


@pytest.mark.parametrize("optimizer_class", [LARS, LAMB])
def test_a_resumed_run_is_the_uninterrupted_one(optimizer_class):
    def make():
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        return model, optimizer_class(model.parameters(), lr=0.1)

    def advance(model, optimizer, steps):
        for step in steps:
            torch.manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()

    model, optimizer = make()
    advance(model, optimizer, range(6))
    first, saved = make()
    advance(first, saved, range(3))
    second, resumed = make()
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(saved.state_dict())
    advance(second, resumed, range(3, 6))
    for one, other in zip(model.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("optimizer_class", "settings", "message"),
    [
        (LARS, {"lr": -1}, "LARS: lr must be finite and >= 0, not -1"),
        (LARS, {"momentum": 1.0}, r"LARS: momentum must be in \[0, 1\), not 1.0"),
        (LAMB, {"weight_decay": float("nan")}, "LAMB: weight_decay must be finite and >= 0, not nan"),
        (LAMB, {"beta2": 1.5}, r"LAMB: beta2 must be in \[0, 1\), not 1.5"),
    ],
)
def test_settings_out_of_range(optimizer_class, settings, message):
    with pytest.raises(ValueError, match=message):
        optimizer_class([nn.Parameter(torch.zeros(1))], **settings)


@pytest.mark.parametrize("optimizer_class", [LARS, LAMB])
def test_gradients(optimizer_class):
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse=False"):
        optimizer_class(embedding.parameters()).step()
    frozen = nn.Parameter(torch.ones(2))
    assert optimizer_class([frozen]).step(lambda: 3.0) == 3.0  # without a gradient nothing moves
    assert torch.equal(frozen.detach(), torch.ones(2))
