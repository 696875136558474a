"""Scenarios of replicas that differ: what is refused, on all of them, and how it is named."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch import nn

from distributed_training import (
    assert_replicas_are_equal,
    make_attached,
    make_model,
    make_optimizer,
    set_gradients,
    train,
    weights,
)
from preconditioner_client import (
    BlockingConfig,
    DistributedConfig,
    GraftingConfig,
    GroupConfig,
    LocalExchange,
    Shampoo,
    StalenessConfig,
    attach,
)
from scripted_exchange import ScriptedExchange


def a_gradient_that_is_not_finite_is_refused_by_all(folder):
    model = make_model()
    optimizer = make_optimizer(model)
    train(model, optimizer, range(3))
    before = weights(model)
    set_gradients(model, 3)
    model[2].weight.grad[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"gradient of 2\.weight holds 1 NaN"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
    train(model, optimizer, range(3, 6))
    assert_replicas_are_equal(model)


def different_models_are_refused_by_name_on_all_ranks(folder):
    torch.manual_seed(0)
    size = 8 if dist.get_rank() else 9
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, size))
    optimizer = make_optimizer(model)
    with pytest.raises(ValueError, match=r"1\.weight is not the same parameter on all ranks: rank 0: .*9, 6"):
        train(model, optimizer, range(1))


def different_numbers_of_parameters_are_refused(folder):
    model = nn.Sequential(*(nn.Linear(4, 6, bias=False) for _ in range(2 + dist.get_rank())))
    with pytest.raises(
        ValueError, match=r"do not train the same: rank 0: at step 0, 2 parameters.*rank 1: .* 3"
    ):
        train(model, make_optimizer(model), range(1))


def different_settings_are_refused_by_name(folder):
    model = make_model()
    optimizer = make_optimizer(model, blocking=BlockingConfig(block_size=8 + dist.get_rank()))
    with pytest.raises(ValueError, match=r"0\.weight is not the same parameter on all ranks"):
        train(model, optimizer, range(1))
    optimizer = make_optimizer(model, grafting=GraftingConfig(method="sgd" if dist.get_rank() else "adam"))
    with pytest.raises(ValueError, match=r"0\.weight is not the same parameter.*ADAM.*SGD"):
        train(model, optimizer, range(1))
    optimizer = make_optimizer(model, lr=1e-3 * (1 + dist.get_rank()))
    with pytest.raises(ValueError, match=r"0\.weight is not the same parameter.*lr=0\.001 .*lr=0\.002 "):
        train(model, optimizer, range(1))
    plain = torch.optim.SGD(model.parameters(), lr=1e-3)
    method = "sgd" if dist.get_rank() else "adam"
    attach(plain, model, grafting=GraftingConfig(method=method), service=LocalExchange())
    with pytest.raises(ValueError, match=r"0\.weight is not the same parameter.*ADAM.*SGD"):
        train(model, plain, range(1))
    optimizer = make_optimizer(model, staleness=StalenessConfig(max_staleness=20 + dist.get_rank()))
    with pytest.raises(ValueError, match="the ranks do not train the same"):
        train(model, optimizer, range(1))
    config = DistributedConfig(overlap=dist.get_rank() == 0)
    with pytest.raises(ValueError, match=r"the ranks do not train the same.*bucket_bytes=None"):
        train(model, make_optimizer(model, distributed=config), range(1))


def different_settings_of_an_attached_optimizer_are_refused_by_name(folder):
    rank = dist.get_rank()
    for make, message in (
        (lambda p: torch.optim.SGD(p, lr=0.1 * (1 + rank)), r"lr=0\.1 .*lr=0\.2 "),
        (lambda p: torch.optim.SGD(p, lr=torch.tensor(0.5 * (1 + rank))), r"lr=0\.5 .*lr=1\.0 "),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5 + rank / 4), r"momentum=0\.5 .*momentum=0\.75 "),
        (
            lambda p: torch.optim.AdamW(p, betas=(0.5, 0.75 + rank / 8)),
            r"0\.5, 0\.75\).*0\.5, 0\.875\)",
        ),
        (lambda p: torch.optim.AdamW(p, weight_decay=0.5 * rank), r"weight_decay=0\.0 .*weight_decay=0\.5 "),
        (lambda p: (torch.optim.SGD, torch.optim.AdamW)[rank](p, lr=0.1), "SGD .*AdamW "),
    ):
        model = make_model()
        optimizer = make(model.parameters())
        handle = attach(optimizer, model, service=LocalExchange())
        before = weights(model)
        with pytest.raises(ValueError, match=r"0\.weight is not the same parameter on all ranks.*" + message):
            train(model, optimizer, range(1))
        assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
        handle.close()
    own = GroupConfig(grafting=GraftingConfig(method="lars"))
    for groups, message in (
        ((None, {1: None}), r"2\.weight is not the same .*rank 0: .*GroupSettings.*rank 1: .* left alone "),
        ((dict.fromkeys(range(2)), {0: None}), r"2\.weight is not the same .* left alone .*GroupSettings"),
        ((dict.fromkeys(range(2)), {}), r"0\.weight is not the same .* left alone .*GroupSettings"),
        (({0: own}, {1: own}), r"0\.weight is not the same .*LARS.*ADAM"),
        (({}, {2: None}), None),  # of a group that nobody has
    ):
        model = make_model()
        optimizer, handle = make_attached(model, cuts=(2,), groups=groups[rank])
        with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
            train(model, optimizer, range(1))
        assert handle.metrics()["step"] == (0 if message else 1)
        handle.close()


def different_settings_of_parameters_without_blocks_are_refused_by_name(folder):
    """There is no session then. In a model with blocks, a group that comes later changes none."""
    model = make_model()
    vectors = [p for p in model.parameters() if p.ndim == 1]
    for parameter in vectors:
        parameter.grad = torch.ones_like(parameter)
    optimizer = Shampoo(vectors, lr=0.1 * (1 + dist.get_rank()), service=LocalExchange())
    with pytest.raises(ValueError, match=r"group0\.parameter0 is not the same.*lr=0\.1 .*lr=0\.2 "):
        optimizer.step()
    with torch.no_grad():
        vectors[0] += dist.get_rank()
    optimizer = Shampoo(vectors, service=LocalExchange())
    with pytest.raises(ValueError, match=r"group0\.parameter0 does not have the same weights"):
        optimizer.step()
    for different in (False, True):
        model, exchange = make_model(), ScriptedExchange()
        optimizer = Shampoo([model[0].weight], service=exchange)
        train(model, optimizer, range(2))
        session = exchange.session
        optimizer.add_param_group({"params": [model[0].bias], "lr": 0.1 * (1 + different * dist.get_rank())})
        if different:
            with pytest.raises(ValueError, match=r"group1\.parameter0 is not the same.*lr=0\.1 .*lr=0\.2 "):
                train(model, optimizer, range(2, 4))
        else:
            train(model, optimizer, range(2, 4))
        assert exchange.session is session


def models_of_their_own_are_refused_unless_distributed_is_off(folder):
    model = make_model()
    with torch.no_grad():
        model[2].weight[0, 0] += dist.get_rank()
    with pytest.raises(ValueError, match=r"2\.weight does not have the same weights.*distributed=\"off\""):
        train(model, make_optimizer(model), range(1))
    optimizer = make_optimizer(model, distributed="off")
    # No collective: ranks may even take different numbers of steps.
    train(model, optimizer, range(3 + dist.get_rank()))
    assert optimizer.metrics()["step"] == 3 + dist.get_rank()


def gradients_of_different_parameters_are_refused_by_name_on_all_ranks(folder):
    model = make_model()
    optimizer = make_optimizer(model)
    train(model, optimizer, range(3))
    with pytest.raises(RuntimeError, match=r"4\.weight has a gradient on the replicas \[1.*\] of"):
        train(model, optimizer, [3], without={4} if dist.get_rank() == 0 else ())
    # In buckets, too, where the first rank has no gradient in a whole group.
    model = make_model()
    groups = [{"params": list(layer.parameters())} for layer in model]
    optimizer = Shampoo(
        [group for group in groups if group["params"]],
        blocking=BlockingConfig(block_size=8),
        service=LocalExchange(1),
        distributed=DistributedConfig(overlap=True, bucket_bytes=300),
    )
    train(model, optimizer, range(3))
    with pytest.raises(RuntimeError, match=r"group1\.parameter0 has a gradient on the replicas \[1.*\] of"):
        train(model, optimizer, [3], without={2, 3} if dist.get_rank() == 0 else ())


def what_some_replicas_alone_do_is_refused_on_all(folder):
    """The others would take its comparison with them for their updates."""
    first = dist.get_rank() == 0
    for overlap in (False, True):
        for change, message in (
            (lambda model, of: of.load_state_dict(of.state_dict()), "a state was loaded"),
            (lambda model, of: of.add_param_group({"params": [("late", model[2].weight)]}), "late is new"),
        ):
            model = make_model()
            optimizer = Shampoo(
                list(model[0].named_parameters()),
                blocking=BlockingConfig(block_size=8),
                service=LocalExchange(1),
                distributed=DistributedConfig(overlap=overlap, bucket_bytes=300),
            )
            train(model, optimizer, range(3))
            if first:
                change(model, optimizer)
            here = rf" \(here {message}\)" if first else ""
            with pytest.raises(
                RuntimeError, match=rf"only the replicas \[0\] of \d .* last step{here}; call"
            ):
                train(model, optimizer, [3])
            # What all of them do is no mistake, also after steps.
            optimizer = make_optimizer(model)
            train(model, optimizer, range(3))
            optimizer.load_state_dict(optimizer.state_dict())
            train(model, optimizer, range(3, 5))


SCENARIOS = [
    a_gradient_that_is_not_finite_is_refused_by_all,
    different_models_are_refused_by_name_on_all_ranks,
    different_numbers_of_parameters_are_refused,
    different_settings_are_refused_by_name,
    different_settings_of_an_attached_optimizer_are_refused_by_name,
    different_settings_of_parameters_without_blocks_are_refused_by_name,
    models_of_their_own_are_refused_unless_distributed_is_off,
    gradients_of_different_parameters_are_refused_by_name_on_all_ranks,
    what_some_replicas_alone_do_is_refused_on_all,
]

ON_FOUR_RANKS = [
    gradients_of_different_parameters_are_refused_by_name_on_all_ranks,
    what_some_replicas_alone_do_is_refused_on_all,
]
