"""Parameters that are special: tied, thawed, very wide, and with roots of another order."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from preconditioner_client import (
    BlockingConfig,
    GraftingConfig,
    LocalExchange,
    Ridge,
    RootConfig,
    Shampoo,
    StalenessConfig,
    StatisticsConfig,
    attach,
)
from scripted_exchange import ScriptedExchange

FRESH = StalenessConfig(refresh_every=1, max_staleness=5)
PLAIN = {
    "staleness": FRESH,
    "grafting": GraftingConfig(method="none"),
    "statistics": StatisticsConfig(accumulation="sum"),
}


class Tied(nn.Module):
    """A language model whose output layer is its embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.output = nn.Linear(4, 7, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, tokens):
        return self.output(self.embedding(tokens))


def shampoo(model, exchange):
    return Shampoo(model.named_parameters(), lr=0.01, staleness=FRESH, service=exchange)


def attached(model, exchange):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    attach(optimizer, model, staleness=FRESH, service=exchange)
    return optimizer


both = pytest.mark.parametrize("make", [shampoo, attached])


@both
def test_tied_parameters_are_one_with_the_sum_of_their_gradients(make):
    torch.manual_seed(0)
    model = Tied()
    exchange = ScriptedExchange()
    optimizer = make(model, exchange)
    before = model.embedding.weight.detach().clone()
    nn.functional.cross_entropy(model(torch.tensor([1, 2])), torch.tensor([2, 3])).backward()
    optimizer.step()
    assert [block.name for block in exchange.session.blocks] == ["embedding.weight"]
    assert model.output.weight is model.embedding.weight
    # The output's gradient reaches all rows, the embedding's only two.
    assert bool((model.output.weight != before).any(dim=1).all())


@both
def test_a_frozen_parameter_can_be_thawed_in_the_middle(make):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    model[0].requires_grad_(False)
    optimizer = make(model, LocalExchange())
    frozen, adopted = model[0].weight.detach().clone(), []
    for step in range(8):
        if step == 4:
            assert torch.equal(model[0].weight, frozen)
            model[0].requires_grad_(True)
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        source = getattr(optimizer, "_attached_preconditioner", optimizer)
        adopted.append(source.metrics()["blocks_with_version"])
    assert adopted[3] == 1
    assert adopted[-1] == 2
    assert not torch.equal(model[0].weight, frozen)


def power(matrix, exponent, ridge=1e-6):
    """Of statistics with the relative ridge, float64."""
    values, vectors = torch.linalg.eigh(matrix.double())
    return vectors @ torch.diag((values + ridge * values[-1]) ** exponent) @ vectors.mT


def one_step(parameter, gradient, **settings):
    """The update of a single step with a learning rate of 1."""
    before = parameter.detach().clone()
    optimizer = Shampoo([parameter], lr=1.0, beta1=0.0, service=LocalExchange(0), **PLAIN, **settings)
    parameter.grad = gradient.clone()
    optimizer.step()
    return before - parameter.detach()


def test_a_very_wide_parameter_is_preconditioned_from_one_side():
    """As an embedding is: exponent -1/2 on the narrow side, and no statistics of the wide one."""
    torch.manual_seed(0)
    parameter, gradient = nn.Parameter(torch.randn(300, 6)), torch.randn(300, 6)
    update = one_step(parameter, gradient, blocking=BlockingConfig(block_size=100, max_side=200))
    expected = gradient.double() @ power(gradient.mT @ gradient, -0.5)
    torch.testing.assert_close(update, expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("exponent", "applied"), [(0.5, 0.5), ({2: 1 / 3, 1: 1.0}, 1 / 3), ({1: 1.0}, 0.25)])
def test_an_exponent_given_for_all_blocks_or_by_their_number_of_sides(exponent, applied):
    torch.manual_seed(0)
    parameter, gradient = nn.Parameter(torch.randn(5, 5)), torch.randn(5, 5) + 3 * torch.eye(5)
    update = one_step(parameter, gradient, root=RootConfig(exponent=exponent, ridge=Ridge(value=1e-3)))
    left, right = (power(s, -applied, 1e-3) for s in (gradient @ gradient.mT, gradient.mT @ gradient))
    torch.testing.assert_close(update, (left @ gradient.double() @ right).float(), rtol=1e-3, atol=1e-4)


def test_an_attached_preconditioner_leaves_the_sign_to_the_optimizer():
    weights = []
    for maximize in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, maximize=maximize)
        attach(optimizer, model, staleness=FRESH, service=LocalExchange())
        for _ in range(5):
            optimizer.zero_grad()
            loss = model(torch.randn(8, 4)).square().mean()
            (-loss if maximize else loss).backward()
            optimizer.step()
        weights.append(model.weight.detach())
    assert torch.equal(*weights)


def changed_by_hand(make, change):
    """Three steps, a change of the groups, and the message of the next step's error."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    optimizer = make(model, LocalExchange())
    for step in range(4):
        if step == 3:
            change(optimizer.param_groups, model)
            before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        if step == 3:
            with pytest.raises(ValueError) as error:
                optimizer.step()
            assert all(map(torch.equal, model.parameters(), before))
            return str(error.value)
        optimizer.step()
    return None


def replace_layer(groups, model):
    model[1] = nn.Linear(6, 5)
    groups[0]["params"][2:] = model[1].parameters()


@both
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda groups, model: groups[0]["params"].pop(), "group 0 had 4 parameters"),
        (lambda groups, model: groups[0]["params"].append(nn.Parameter(torch.ones(2))), "has 5 now"),
        (replace_layer, r"1.weight of the shape (3, 6) was replaced in parameter group 0 by"),
        (lambda groups, model: groups.clear(), "there were 1 parameter groups, and now are 0"),
    ],
    ids=["removed", "appended", "replaced", "no group"],
)
def test_groups_that_are_changed_by_hand_are_refused_by_name(make, change, message):
    """Their parameters would meet the blocks of others."""
    found = changed_by_hand(make, change)
    assert message in found
    assert "add_param_group()" in found


@both
def test_a_parameter_that_another_of_its_shape_replaces_goes_on_with_its_blocks(make):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    optimizer = make(model, LocalExchange())
    for step in range(6):
        if step == 3:
            model[0].weight = nn.Parameter(torch.randn(6, 4))
            optimizer.param_groups[0]["params"][0] = model[0].weight
            before = model[0].weight.detach().clone()
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
    assert not torch.equal(model[0].weight, before)
