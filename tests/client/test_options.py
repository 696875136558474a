"""Options of the wrong type: the error names the option, its value and what is needed, at construction."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import torch
from torch import nn

from preconditioner_client import (
    KFAC,
    BlockingConfig,
    GraftingConfig,
    LocalExchange,
    Ridge,
    RootConfig,
    ServiceConfig,
    Shampoo,
    StalenessConfig,
    StatisticsConfig,
    attach,
)


def shampoo(service=None, **settings):
    return Shampoo(nn.Linear(3, 2).parameters(), service=service or LocalExchange(), **settings)


def kfac(service=None, **settings):
    return KFAC(nn.Linear(3, 2), service=service or LocalExchange(), **settings)


def attached(service=None, **settings):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    return attach(optimizer, model, service=service or LocalExchange(), **settings)


def in_a_group(**settings):
    model = nn.Linear(3, 2)
    return Shampoo([{"params": model.parameters(), **settings}], service=LocalExchange())


def of_the_optimizer(**settings):
    model = nn.Linear(3, 2)
    attach(torch.optim.SGD([{"params": model.parameters(), **settings}]), model, service=LocalExchange())


MAKERS = (shampoo, kfac, in_a_group, of_the_optimizer)


@pytest.mark.parametrize(
    ("make", "option", "value"),
    [
        *((make, "lr", "1e-3") for make in MAKERS),
        *((make, "weight_decay", "0.1") for make in MAKERS),
        # In the optimizer of somebody else it may mean something, see below.
        *((make, "lr", None) for make in MAKERS if make is not of_the_optimizer),
    ],
)
def test_a_number_that_is_none(make, option, value):
    with pytest.raises(ValueError, match=rf"{option} must be a number, not {value!r}"):
        make(**{option: value})


def test_what_yaml_makes_of_a_number_is_told():
    with pytest.raises(ValueError, match=r"'1e-3' of type str; in YAML write 1\.0e-3"):
        shampoo(lr="1e-3")
    with pytest.raises(ValueError, match="damping must be a number, not '1e-2'"):
        kfac(damping="1e-2")


def test_an_optimizer_that_finds_its_own_rate_may_have_none_in_its_groups():
    parameter = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    group = optimizer.param_groups[0]
    group["lr"] = None
    attachment = attach(optimizer, service=LocalExchange())
    # SGD stands for such an optimizer: its rate comes once the preconditioner has had its turn.
    optimizer.register_step_pre_hook(lambda *_: group.update(lr=0.1))
    for step in range(1, 4):
        group["lr"] = None
        before = parameter.detach().clone()
        parameter.grad = torch.ones(3, 2)
        optimizer.step()
        assert attachment.metrics()["step"] == step
        assert bool((parameter < before).all())
    attachment.detach()


@pytest.mark.parametrize(
    "lr", [np.float32(0.01), np.float64(0.01), np.array(0.01), torch.tensor(0.01), torch.tensor([0.01])]
)
def test_numbers_of_numpy_and_tensors_are_numbers(lr):
    parameter = nn.Parameter(torch.ones(3, 2))
    optimizer = Shampoo([parameter], lr=lr, service=LocalExchange())
    parameter.grad = torch.ones(3, 2)
    optimizer.step()
    assert parameter.detach()[0, 0] < 1
    assert StalenessConfig(max_staleness=np.int64(50)).max_staleness == 50


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ServiceConfig(connect_timeout="5"), "connect_timeout must be a number, not '5'"),
        (lambda: ServiceConfig(workers="5"), "workers must be a whole number, not '5'"),
        (lambda: StalenessConfig(max_staleness="200"), "max_staleness must be a whole number, not '200'"),
        (lambda: StalenessConfig(refresh_every=2.5), r"refresh_every must be a whole number, not 2\.5"),
        (lambda: BlockingConfig(block_size=16.0), r"block_size must be a whole number, not 16\.0"),
        (lambda: GraftingConfig(epsilon="1e-8"), "epsilon must be a number, not '1e-8'"),
        (lambda: StatisticsConfig(every=1.5), r"every must be a whole number, not 1\.5"),
        (lambda: Ridge(value="1e-6"), "value must be a number, not '1e-6'"),
        (lambda: RootConfig(exponent="0.5"), "exponent must be a number, not '0.5'"),
    ],
)
def test_fields_of_configs(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "option", "needed"),
    [
        (make, option, needed)
        for make in (shampoo, kfac, attached)
        for option, needed in (
            ("staleness", "StalenessConfig"),
            ("grafting", "GraftingConfig"),
            ("statistics", "StatisticsConfig"),
            ("blocking", "BlockingConfig"),
            ("root", "RootConfig"),
            ("distributed", "DistributedConfig"),
        )
        if (make, option) != (kfac, "root")  # it has no such option
    ],
)
@pytest.mark.parametrize("value", [{}, {"beta": 0.9}])
def test_a_dict_in_place_of_a_config(make, option, needed, value):
    with pytest.raises(ValueError, match=rf"{option} must be .*{needed}, not {re.escape(repr(value))}"):
        make(**{option: value})


@pytest.mark.parametrize("make", [shampoo, kfac, attached])
@pytest.mark.parametrize("service", [50051, {"token": "secret"}, LocalExchange])
def test_a_service_that_is_none(make, service):
    with pytest.raises(TypeError, match=r"service must be .* or an Exchange, not (int|dict|type)") as caught:
        make(service=service)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("make", [shampoo, kfac, attached])
@pytest.mark.parametrize("job", ["my job/1", "", 7])
def test_the_name_of_a_job_is_checked_at_construction(make, job):
    with pytest.raises(ValueError, match=f"job {job!r} is not 1 to 200 characters"):
        make(job=job)


def test_arguments_in_each_other_s_place():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(ValueError, match=r"model must be a torch\.nn\.Module.*not generator; .*KFAC\(model,"):
        KFAC(model.parameters())
    with pytest.raises(ValueError, match=r"Optimizer, not Linear: attach\(optimizer, model\)"):
        attach(model, optimizer)
    with pytest.raises(ValueError, match=r"model must be a torch\.nn\.Module or None, not SGD"):
        attach(optimizer, optimizer)


def test_an_optimizer_that_preconditions_is_not_attached_to():
    with pytest.raises(ValueError, match="Shampoo preconditions by itself, and would do it twice"):
        attach(shampoo(), service=LocalExchange())


def test_the_known_keys_of_a_group_are_all_named():
    with pytest.raises(ValueError, match="unknown key") as caught:
        in_a_group(weigth_decay=0.1)
    known = str(caught.value).split("known: ")[1]
    for key in ("grafting", "statistics", "blocking", "root", "lr", "weight_decay"):
        assert f"'{key}'" in known


@pytest.mark.parametrize("make", [shampoo, kfac])
@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=9, cycle_momentum=False),
        lambda o: torch.optim.lr_scheduler.CyclicLR(o, 1e-3, 0.1, cycle_momentum=False),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 9),
        lambda o: torch.optim.swa_utils.SWALR(o, 0.1),
    ],
)
def test_a_group_may_be_copied_with_what_schedulers_and_state_dicts_left_in_it(make, schedule):
    optimizer = make()
    schedule(optimizer)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    group = optimizer.param_groups[0]
    optimizer.add_param_group(
        {**group, "params": [nn.Parameter(torch.ones(2, 2))], "param_names": ["added"]}
        if "param_names" in group
        else {**group, "params": [nn.Parameter(torch.ones(2, 2))]}
    )
    assert len(optimizer.param_groups) == 2


def test_keys_of_schedulers_that_cycle_momentum_are_known():
    in_a_group(base_momentum=0.85, max_momentum=0.95, max_lr=0.1, min_lr=1e-5, initial_lr=1e-3)


@pytest.mark.parametrize("kind", ["shampoo", "kfac", "attach"])
def test_a_parameter_that_changed_its_shape_is_named(kind):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if kind == "shampoo":
        optimizer = Shampoo(model.named_parameters(), service=LocalExchange())
    elif kind == "kfac":
        optimizer = KFAC(model, service=LocalExchange())
    else:
        attach(optimizer, model, service=LocalExchange())

    def step():
        optimizer.zero_grad()
        model(torch.ones(5, 3)).square().mean().backward()
        optimizer.step()

    step()
    model[1].weight.data = torch.ones(6, 4)
    model[1].bias.data = torch.ones(6)
    with pytest.raises(ValueError, match=r"1\.weight has the shape \(6, 4\), but had \(2, 4\)"):
        step()
