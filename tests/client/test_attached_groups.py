"""Parameter groups with settings of their own inside of an optimizer, and groups that are left alone."""

from __future__ import annotations

import copy
import io
import re

import numpy as np
import pytest
import torch
from torch import nn

from preconditioner_client import (
    BlockingConfig,
    GraftingConfig,
    GroupConfig,
    LocalExchange,
    RootConfig,
    Shampoo,
    StalenessConfig,
    StatisticsConfig,
    attach,
)
from scripted_exchange import ScriptedExchange

FRESH = StalenessConfig(refresh_every=1, max_staleness=5)
OWN = {
    "grafting": GraftingConfig(method="adam", beta2=0.9),
    "statistics": StatisticsConfig(accumulation="sum", every=2),
    "blocking": BlockingConfig(block_size=4),
    "root": RootConfig(exponent=0.5),
}


def model_and_data():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))
    return model, torch.randn(32, 6) * torch.logspace(0, -2, 6), torch.randn(32, 3)


def by_layer(model):
    return [{"params": list(layer.parameters())} for layer in model if isinstance(layer, nn.Linear)]


def backward(model, x, y):
    model.zero_grad()
    nn.functional.mse_loss(model(x), y).backward()


def attached(groups, make=torch.optim.SGD, exchange=None, **settings):
    model, x, y = model_and_data()
    optimizer = make(by_layer(model), lr=0.01)
    service = exchange or LocalExchange()
    handle = attach(optimizer, model, groups=groups, staleness=FRESH, service=service, **settings)
    return model, x, y, optimizer, handle


def bits(model):
    return [p.detach().clone() for p in model.parameters()]


def equal(some, others):
    return [torch.equal(a, b) for a, b in zip(some, others, strict=True)]


@pytest.mark.parametrize("option", [*OWN, "all"])
def test_groups_may_differ_as_those_of_shampoo_do(option):
    """The two share all machinery, so with SGD behind the hook the weights are the same to the bit."""
    own = OWN if option == "all" else {option: OWN[option]}
    common = {"grafting": GraftingConfig(method="sgd"), "blocking": BlockingConfig(block_size=5)}
    runs = []
    for groups in ({1: GroupConfig(**own)}, {}):
        model, x, y, optimizer, _ = attached(groups, **common)
        runs.append((model, optimizer))
    model, _, _ = model_and_data()
    first, second, third = by_layer(model)
    shampoo = Shampoo(
        [first, {**second, **own}, third],
        lr=0.01,
        beta1=0.0,
        staleness=FRESH,
        service=LocalExchange(),
        **common,
    )
    runs.append((model, shampoo))
    for _ in range(8):
        for of_run, optimizer in runs:
            backward(of_run, x, y)
            optimizer.step()
    differing, alike, shampoos = (bits(of_run) for of_run, _ in runs)
    assert all(equal(differing, shampoos))
    assert not all(equal(differing, alike))


def test_a_group_left_alone_keeps_its_gradients_and_has_no_statistics():
    exchange = ScriptedExchange()
    model, x, y, optimizer, handle = attached(
        {2: None}, exchange=exchange, grafting=GraftingConfig(method="adam")
    )
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append([p.grad.clone() for p in model.parameters()]))
    for _ in range(3):
        backward(model, x, y)
        given = [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        assert equal(seen[-1], given) == [False] * 4 + [True] * 2
    assert [block.name for block in exchange.session.blocks] == ["0.weight", "2.weight"]
    assert handle.metrics()["blocks"] == 2
    assert [len(state) > 1 for state in handle.state_dict()["state"]] == [True] * 4 + [False] * 2


def test_numbers_are_also_those_of_groups_that_come_later():
    exchange = ScriptedExchange()
    model, x, y = model_and_data()
    groups = by_layer(model)
    optimizer = torch.optim.SGD(groups[:1], lr=0.1)
    own = GroupConfig(blocking=BlockingConfig(block_size=8))
    handle = attach(optimizer, model, groups={1: None, 2: own}, service=exchange)
    expected = ["0.weight"], ["0.weight"], ["0.weight", "4.weight"]
    for added, names in zip((None, *groups[1:]), expected, strict=True):
        if added:
            optimizer.add_param_group(added)
        backward(model, x, y)
        optimizer.step()
        assert [block.name for block in exchange.session.blocks] == names
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(16, 16))]})
    optimizer.param_groups[3]["params"][0].grad = torch.ones(16, 16)
    optimizer.step()
    # Not of those that differ, so it is one block.
    assert [block.name for block in exchange.session.blocks][-1] == "group3.parameter0"
    handle.detach()


def test_the_optimizer_s_own_groups_and_state_stay_as_they_are():
    model, x, y, optimizer, handle = attached({0: GroupConfig(**OWN), 1: None}, torch.optim.AdamW)
    plain = torch.optim.AdamW(by_layer(model_and_data()[0]), lr=0.01)
    backward(model, x, y)
    optimizer.step()
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    assert saved["param_groups"] == plain.state_dict()["param_groups"]
    handle.detach()
    assert optimizer.state_dict().keys() == plain.state_dict().keys()
    assert [group.keys() for group in optimizer.param_groups] == [g.keys() for g in plain.param_groups]


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_with_all_groups_left_alone_it_is_the_optimizer_itself(make):
    exchange = ScriptedExchange()
    model, x, y, optimizer, handle = attached(dict.fromkeys(range(3)), make, exchange)
    alone, _, _ = model_and_data()
    plain = make(by_layer(alone), lr=0.01)
    for _ in range(4):
        for of_run, own in ((model, optimizer), (alone, plain)):
            backward(of_run, x, y)
            own.step()
    assert all(equal(bits(model), bits(alone)))
    assert exchange.session is None
    assert handle.metrics()["blocks"] == 0


def test_a_group_left_alone_may_hold_what_has_no_statistics():
    """Sparse gradients, complex parameters, and shapes that change."""
    torch.manual_seed(0)
    table = nn.Embedding(9, 4, sparse=True)
    layer = nn.Linear(4, 3)
    wave = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    groups = [{"params": [table.weight]}, {"params": [wave]}, {"params": list(layer.parameters())}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    handle = attach(optimizer, groups={0: None, 1: None}, staleness=FRESH, service=LocalExchange())
    for step in range(4):
        if step == 2:
            wave.data = torch.ones(5, dtype=torch.complex64)
        optimizer.zero_grad()
        (layer(table(torch.tensor([step, 8]))).square().sum() + wave.abs().square().sum()).backward()
        given = [p.grad.to_dense().clone() for p in (table.weight, wave)]
        expected = [p.detach() - 0.1 * g for p, g in zip((table.weight, wave), given, strict=True)]
        optimizer.step()
        assert table.weight.grad.is_sparse
        assert all(equal((p.grad.to_dense() for p in (table.weight, wave)), given))
        for parameter, value in zip((table.weight, wave), expected, strict=True):
            torch.testing.assert_close(parameter.detach(), value)
    assert handle.metrics()["blocks_with_version"] == 1
    # The step is one: none of it is made where a gradient is not finite.
    for parameter in (table.weight, wave):
        optimizer.zero_grad()
        (layer(table(torch.tensor([1, 8]))).square().sum() + wave.abs().square().sum()).backward()
        (parameter.grad._values() if parameter is table.weight else parameter.grad)[0] = float("inf")
        with pytest.raises(ValueError, match=r"gradient of group[01]\.parameter0 holds \d NaN or infinite"):
            optimizer.step()
    with pytest.raises(ValueError, match="is complex"):
        attach(torch.optim.SGD(groups, lr=0.1), groups={0: None}, service=LocalExchange())


def test_a_gradient_that_is_not_finite_refuses_the_step_also_where_its_group_is_left_alone():
    model, x, y, optimizer, handle = attached({2: None}, grafting=GraftingConfig(method="adam"))
    for _ in range(3):
        backward(model, x, y)
        optimizer.step()
    before, state = bits(model), copy.deepcopy(handle.state_dict()["state"])
    backward(model, x, y)
    model[4].weight.grad[0, 0] = float("nan")
    given = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"gradient of 4\.weight holds 1 NaN"):
        optimizer.step()
    assert all(equal(bits(model), before))
    assert equal([p.grad for p in model.parameters()], given) == [True] * 4 + [False, True]  # NaN is not NaN
    for old, new in zip(state, handle.state_dict()["state"], strict=True):
        assert all(torch.equal(new[k], v) if torch.is_tensor(v) else new[k] == v for k, v in old.items())
    assert handle.metrics()["step"] == 3


def test_a_step_of_a_group_left_alone_is_a_step():
    """A head may be trained first; and a rate of 0 beside a gradient is a warm-up, no initialisation."""
    model, x, y, optimizer, handle = attached({2: None})
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    backward(model, x, y)
    for parameter in (*model[0].parameters(), *model[2].parameters()):
        parameter.grad.zero_()
    optimizer.step()
    assert handle.metrics()["step"] == 1
    for layer in (model[0], model[2]):
        layer.requires_grad_(False)
        layer.zero_grad()
    backward(model, x, y)
    optimizer.step()
    assert handle.metrics()["step"] == 2


def test_gradients_that_are_still_scaled_are_refused_for_all_groups():
    model, x, y, optimizer, _ = attached({2: None})
    backward(model, x, y)
    optimizer.grad_scale = torch.tensor(8.0)
    with pytest.raises(RuntimeError, match="still scaled"):
        optimizer.step()


@pytest.mark.parametrize(
    "groups", [[None], "1", 1, {-1: None}, {"1": None}, {1.0: None}, {True: None}, {None: None}]
)
def test_numbers_of_groups_that_are_none(groups):
    with pytest.raises(ValueError, match=r"groups must (map|name).*not.*" + re.escape(repr(groups)[1:2])):
        attached(groups)


@pytest.mark.parametrize("own", [{}, {"statistics": StatisticsConfig()}, False, StatisticsConfig(), "sgd"])
def test_settings_of_a_group_that_are_none(own):
    with pytest.raises(
        ValueError, match=rf"groups\[7\] must be a GroupConfig, or None.*{re.escape(repr(own))}"
    ):
        attached({7: own})


@pytest.mark.parametrize("option", OWN)
def test_a_dict_in_place_of_a_group_s_config(option):
    with pytest.raises(
        ValueError, match=rf"{option} must be a {type(OWN[option]).__name__}, not {{'beta': 1}}"
    ):
        GroupConfig(**{option: {"beta": 1}})


def test_numbers_of_numpy_name_groups_too():
    model, x, y, optimizer, handle = attached({np.int64(1): None})
    backward(model, x, y)
    optimizer.step()
    assert handle.metrics()["blocks"] == 2
