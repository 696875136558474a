"""Momentum before grafting: each block by itself, whatever the others do, and in the order it began with."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import nn

from kfac_models import Words, batch, loss_of
from preconditioner_client import (
    KFAC,
    BlockingConfig,
    GraftingConfig,
    LocalExchange,
    Shampoo,
    StalenessConfig,
)
from scripted_exchange import ScriptedExchange

AVERAGES = {"momentum": 0.9, "dampening": 0.8, "momentum_of": "preconditioned"}


def make(params, **settings):
    defaults = {
        "lr": 1e-2,
        "beta1": 0.5,
        "grafting": GraftingConfig(method="adagrad", epsilon=1e-10, blend_steps=3),
        "blocking": BlockingConfig(block_size=4),
        "staleness": StalenessConfig(refresh_every=2, max_staleness=50, stagger=False),
        "service": LocalExchange(1),
    }
    return Shampoo(params, **(defaults | AVERAGES | settings))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["none", "sgd", "adagrad", "lars"])
def test_blocks_are_averaged_as_in_optimizers_of_their_own(method, dtype):
    """Among five of one shape, of which those without a gradient are others in every step."""
    torch.manual_seed(0)
    grafting = GraftingConfig(method=method, blend_steps=3)
    together = [nn.Parameter(torch.randn(6, 5).to(dtype)) for _ in range(5)]
    apart = [nn.Parameter(p.detach().clone()) for p in together]
    # So that every optimizer makes a step each time.
    ones = [nn.Parameter(torch.ones(2)) for _ in range(6)]
    optimizer = make([*together, ones[0]], grafting=grafting)
    others = [make([p, one], grafting=grafting) for p, one in zip(apart, ones[1:], strict=True)]
    choice = random.Random(1)
    for _ in range(30):
        for one in ones:
            one.grad = torch.ones(2)
        for p, q in zip(together, apart, strict=True):
            gradient = (0.1 * torch.randn(6, 5) + 0.1 * p.detach()).to(dtype)
            p.grad, q.grad = (None, None) if choice.random() < 0.4 else (gradient, gradient.clone())
        for each in (optimizer, *others):
            each.step()
    assert optimizer.metrics()["versions_adopted"] > 20 * len(together)
    for p, q in zip(together, apart, strict=True):
        assert torch.equal(p, q), f"up to {(p - q).abs().max()}"


def test_a_step_without_a_usable_version_brings_nothing_and_lets_the_rest_fade():
    exchange = ScriptedExchange()
    parameter = nn.Parameter(torch.zeros(2, 2))
    staleness = StalenessConfig(refresh_every=1, max_staleness=2, policy="graft")
    settings = {"beta1": 0.0, "grafting": GraftingConfig(method="sgd"), "staleness": staleness}
    optimizer = make([parameter], lr=1.0, service=exchange, **settings)
    directions, products = torch.zeros(2, 2), torch.zeros(2, 2)
    used = []
    for step in range(1, 12):
        parameter.grad = torch.tensor([[1.0, 2.0], [3.0, 4.0]]) * (-1) ** (step // 3)
        before = parameter.detach().clone()
        optimizer.step()
        if step in (1, 8):
            exchange.answer(0, step)
        directions = 0.9 * directions + 0.2 * parameter.grad
        products = 0.9 * products
        age = optimizer.metrics()["age"]
        usable = age is not None and age <= staleness.max_staleness
        used.append(usable)
        if usable:
            p_0, p_1 = (optimizer._engine.plans[0].stacks[0].stack.preconditioners[i][0] for i in range(2))
            products = products + 0.2 * p_0 @ parameter.grad @ p_1
            expected = products * directions.norm() / products.norm()
        else:
            expected = directions
        torch.testing.assert_close(before - parameter, expected, rtol=1e-5, atol=1e-6)
    assert "".join("-+"[usable] for usable in used) == "-++-----++-"


def snapshot(optimizer):
    return copy.deepcopy(
        [optimizer.state_dict()["state"], [p for g in optimizer.param_groups for p in g["params"]]]
    )


@pytest.mark.parametrize("order", ["grafted", "precondition"])
def test_another_order_in_a_live_group_is_refused_before_anything_changes(order):
    parameter = nn.Parameter(torch.randn(4, 4))
    optimizer = make([parameter])
    for _ in range(3):
        parameter.grad = torch.randn(4, 4)
        optimizer.step()
    before = snapshot(optimizer)
    optimizer.param_groups[0]["momentum_of"] = order
    with pytest.raises(
        ValueError, match=rf"momentum_of of group 0 became '{order}' after .* 'preconditioned'"
    ):
        optimizer.step()
    optimizer.param_groups[0]["momentum_of"] = "preconditioned"
    for key, value in before[0][0].items():
        now = optimizer.state_dict()["state"][0][key]
        assert torch.equal(now, value) if torch.is_tensor(value) else now == value, key
    assert torch.equal(parameter, before[1][0])
    optimizer.step()


def test_layers_have_no_averages_to_begin_with_later():
    model = Words()
    optimizer = KFAC(model, service=LocalExchange())
    optimizer.param_groups[0]["momentum_of"] = "preconditioned"
    loss_of(model, *batch(model, 0)).backward()
    with pytest.raises(ValueError, match=r"of group 0 became 'preconditioned' after .* 'grafted'"):
        optimizer.step()


def test_a_copied_group_keeps_its_momentum_where_another_s_is_cycled():
    first, second = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
    optimizer = Shampoo([first], lr=0.1, service=LocalExchange())
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=20)
    optimizer.add_param_group({**optimizer.param_groups[0], "params": [second], **AVERAGES})
    for parameter in (first, second):
        parameter.grad = torch.ones(4, 4)
    optimizer.step()
    assert optimizer.param_groups[1]["momentum"] == 0.9
    assert optimizer.param_groups[0]["momentum"] == 0.0, "cycled as beta1"


@pytest.mark.parametrize("averages", [{}, AVERAGES], ids=["updates averaged", "averages grafted"])
def test_momentum_that_is_cycled_through_zero_resumes_bit_for_bit(averages):
    def begin():
        torch.manual_seed(0)
        parameter = nn.Parameter(torch.randn(4, 4))
        settings = {"momentum_of": "grafted", "service": LocalExchange()} | averages
        optimizer = make([parameter], **settings)
        limits = {"base_momentum": 0.0, "max_momentum": 0.9}
        return parameter, optimizer, torch.optim.lr_scheduler.CyclicLR(optimizer, 0.01, 0.02, 4, **limits)

    def train(parameter, optimizer, scheduler, steps):
        for step in steps:
            parameter.grad = torch.full((4, 4), 1.0 + step) + torch.eye(4)
            optimizer.step()
            scheduler.step()

    whole, optimizer, scheduler = begin()
    train(whole, optimizer, scheduler, range(4))
    assert optimizer.param_groups[0]["momentum"] == 0
    saved = copy.deepcopy((whole.detach(), optimizer.state_dict(), scheduler.state_dict()))
    resumed, second, second_scheduler = begin()
    resumed.data.copy_(saved[0])
    second.load_state_dict(saved[1])
    second_scheduler.load_state_dict(saved[2])
    train(whole, optimizer, scheduler, range(4, 12))
    train(resumed, second, second_scheduler, range(4, 12))
    assert torch.equal(whole, resumed)


def test_no_momentum_is_no_average():
    steps = []
    for dampening in (0.0, 0.9):
        parameter = nn.Parameter(torch.zeros(4, 4))
        optimizer = make([parameter], dampening=dampening, beta1=0.0)
        optimizer.param_groups[0]["momentum"] = 0.0  # as a scheduler may have it
        parameter.grad = torch.ones(4, 4)
        optimizer.step()
        steps.append(parameter.detach().clone())
    assert torch.equal(*steps)
