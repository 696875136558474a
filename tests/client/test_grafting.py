"""With preconditioning off, each grafting method alone is the torch optimizer of that name, to rounding."""

from __future__ import annotations

import pytest
import torch

from preconditioner_client import (
    BlockingConfig,
    GraftingConfig,
    LocalExchange,
    Ridge,
    RootConfig,
    Shampoo,
    StalenessConfig,
)

OFF = BlockingConfig(max_side=1)
SHAPES = [(5, 3), (7,), (4, 3, 2, 2)]


def train(make, steps=40, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for s in SHAPES]
    optimizer = make(params)
    for _ in range(steps):
        for p in params:
            p.grad = 0.5 * p.detach() + torch.randn(p.shape, generator=generator, dtype=dtype)
        optimizer.step()
    return params


def ours(method, **kwargs):
    grafting = GraftingConfig(
        method=method, beta2=kwargs.pop("beta2", 0.999), epsilon=kwargs.pop("epsilon", 1e-8)
    )
    return lambda params: Shampoo(params, grafting=grafting, blocking=OFF, service=LocalExchange(), **kwargs)


CASES = {
    "sgd": (
        ours("sgd", lr=0.1, beta1=0.0, momentum=0.9, dampening=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.1),
    ),
    "sgd nesterov, L2": (
        ours(
            "sgd",
            lr=0.1,
            beta1=0.0,
            momentum=0.9,
            nesterov=True,
            weight_decay=0.05,
            decoupled_weight_decay=False,
        ),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.05),
    ),
    "adagrad": (
        ours("adagrad", lr=0.1, beta1=0.0, epsilon=1e-10),
        lambda p: torch.optim.Adagrad(p, lr=0.1),
    ),
    "rmsprop": (
        ours("rmsprop", lr=0.01, beta1=0.0, beta2=0.97, momentum=0.5),
        lambda p: torch.optim.RMSprop(p, lr=0.01, alpha=0.97, momentum=0.5),
    ),
    "adam": (
        ours("adam", lr=0.01, beta1=0.9, beta2=0.99),
        lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.9, 0.99)),
    ),
    "adamw": (
        ours("adam", lr=0.01, beta1=0.9, beta2=0.99, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.9, 0.99), weight_decay=0.1),
    ),
    "adam maximize": (
        ours("adam", lr=0.01, beta1=0.9, beta2=0.99, maximize=True),
        lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.9, 0.99), maximize=True),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_is_the_torch_optimizer(name):
    make_ours, make_torch = CASES[name]
    for mine, theirs in zip(train(make_ours), train(make_torch), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)


def test_a_block_without_a_version_takes_the_diagonal_step_alone():
    """Gated on having a version, never on a step count: nothing ever arrives from this exchange."""

    class Silent(LocalExchange):
        def collect(self, step):
            return []

    def silent(params):
        return Shampoo(params, lr=0.01, beta1=0.9, grafting=GraftingConfig(beta2=0.99), service=Silent())

    def adam(params):
        return torch.optim.Adam(params, lr=0.01, betas=(0.9, 0.99))

    for mine, theirs in zip(train(silent), train(adam), strict=True):
        # Blocks pass through float32 only when they are preconditioned.
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("method", ["lars", "lamb"])
def test_layer_wise_methods_take_their_published_step(method):
    """arXiv 1708.03888 and 1904.00962, one step from zero moments, weight decay within the norms."""
    decay, lr, eta = 0.1, 0.5, 0.02
    w = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64)
    g = torch.tensor([[0.3, 0.1], [-0.2, 0.4]], dtype=torch.float64)
    if method == "lars":
        step = (g + decay * w) * eta * w.norm() / (g.norm() + decay * w.norm())
    else:
        r = g / (g.abs() + 1e-6) + decay * w
        step = r * w.norm() / r.norm()
    parameter = torch.nn.Parameter(w.clone())
    grafting = GraftingConfig(method=method, beta2=0.99, epsilon=1e-6, trust_coefficient=eta)
    optimizer = Shampoo(
        [parameter],
        lr=lr,
        beta1=0.9 if method == "lamb" else 0.0,
        weight_decay=decay,
        grafting=grafting,
        blocking=OFF,
        service=LocalExchange(),
    )
    parameter.grad = g.clone()
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), w - lr * step, rtol=1e-12, atol=0)


def test_a_pseudo_inverse_of_nothing_makes_no_step_and_no_nan():
    """Statistics of gradients that were all zero, as of rare tokens, and then the first real one."""
    weight = torch.nn.Parameter(torch.ones(40, 30))
    optimizer = Shampoo(
        [weight],
        root=RootConfig(ridge=Ridge(kind="pseudo_inverse", value=1e-6)),
        staleness=StalenessConfig(refresh_every=1, max_staleness=5),
        service=LocalExchange(delay=2),
    )
    for step in range(6):
        weight.grad = torch.full_like(weight, float(step >= 4))
        optimizer.step()
        assert optimizer.metrics()["versions_adopted"] == max(0, step - 1)
        if step == 4:
            torch.testing.assert_close(weight.detach(), torch.ones(40, 30), rtol=0, atol=0)
    assert bool(weight.isfinite().all())


def test_a_layer_wise_ratio_is_one_where_a_norm_is_zero():
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = Shampoo(
        [parameter],
        lr=1.0,
        beta1=0.0,
        grafting=GraftingConfig(method="lars"),
        blocking=OFF,
        service=LocalExchange(),
    )
    parameter.grad = torch.ones(2, 2)
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), -torch.ones(2, 2))
