"""Closures: evaluated once, before the preconditioner's turn, and never behind a scaler."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from preconditioner_client import LocalExchange, Shampoo, StalenessConfig, attach

FRESH = StalenessConfig(refresh_every=1, max_staleness=5)


def shampoo(model):
    return Shampoo(model.named_parameters(), lr=0.1, staleness=FRESH, service=LocalExchange())


def attached(model, kind=torch.optim.SGD, **settings):
    optimizer = kind(model.parameters(), lr=0.1, **settings)
    attach(optimizer, model, staleness=FRESH, service=LocalExchange())
    return optimizer


def problem(make):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = make(model)
    x = torch.randn(8, 4)

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    return model, optimizer, closure


@pytest.mark.parametrize("make", [shampoo, attached])
def test_the_step_is_that_of_a_loop_without_one_and_gives_the_loss(make):
    model, optimizer, closure = problem(make)
    expected, plain, backward = problem(make)
    for call in (
        lambda: optimizer.step(closure),
        lambda: optimizer.step(closure=closure),
        torch.no_grad()(lambda: optimizer.step(closure)),
    ):
        loss = backward()
        plain.step()
        assert torch.equal(call(), loss)
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(p, q)


class TwoStages(torch.optim.Optimizer):
    """Evaluates its closure again in a step, as SAM does."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    def step(self, closure):
        closure()
        return closure()


def test_an_optimizer_that_evaluates_it_again_is_stopped():
    _, optimizer, closure = problem(lambda model: attached(model, TwoStages))
    with pytest.raises(RuntimeError, match="more than once in a step"):
        optimizer.step(closure)


def test_lbfgs_is_refused():
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="LBFGS evaluates its closure many times"):
        attach(torch.optim.LBFGS(model.parameters()), model, service=LocalExchange())


@pytest.mark.parametrize("make", [shampoo, attached])
@pytest.mark.parametrize("as_keyword", [True, False])
def test_behind_a_scaler_it_is_refused_and_nothing_has_changed(make, as_keyword):
    """torch itself refuses only the keyword."""
    model, optimizer, closure = problem(make)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.randn(8, 4)).square().mean()).backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"[Cc]losure"):
        scaler.step(optimizer, closure=closure) if as_keyword else scaler.step(optimizer, closure)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
