"""Checkpoints: complete, loadable without pickle, bit-exact, with keys that never change."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from torch import nn

from preconditioner_client import (
    BlockingConfig,
    GraftingConfig,
    LocalExchange,
    Shampoo,
    StalenessConfig,
    attach,
)

SCHEDULED = StalenessConfig(refresh_every=3, adoption="scheduled", delay=5, max_staleness=20)
BLOCK = "block.0:4,0:4."
SETTINGS = (
    "lr",
    "beta1",
    "momentum",
    "dampening",
    "weight_decay",
    "nesterov",
    "decoupled_weight_decay",
    "maximize",
)


AVERAGES = {"momentum_of": "preconditioned", "dampening": 0.9}


def setup(momentum=0.9, staleness=SCHEDULED, delay=0, block_size=4, dtype=torch.float32, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)
    optimizer = Shampoo(
        model.named_parameters(),
        lr=1e-2,
        momentum=momentum,
        weight_decay=0.01,
        blocking=BlockingConfig(block_size=block_size),
        staleness=staleness,
        service=LocalExchange(delay),
        **settings,
    )
    return model, optimizer


def train(model, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 5, generator=generator).to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("stop", [1, 4, 10, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, AVERAGES], ids=["updates averaged", "averages grafted"])
def test_a_scheduled_run_resumes_bit_for_bit(stop, dtype, settings):
    model, optimizer = setup(dtype=dtype, **settings)
    train(model, optimizer, range(30))

    first_model, first = setup(dtype=dtype, **settings)
    train(first_model, first, range(stop))
    saved = through_a_file({"model": first_model.state_dict(), "optimizer": first.state_dict()})

    second_model, second = setup(dtype=dtype, **settings)
    second_model.load_state_dict(saved["model"])
    second.load_state_dict(saved["optimizer"])
    train(second_model, second, range(stop, 30))
    for a, b in zip(model.parameters(), second_model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert second.metrics()["waits"] == 0


def test_a_resumed_run_opens_a_newer_epoch():
    model, optimizer = setup()
    train(model, optimizer, range(5))
    saved = optimizer.state_dict()
    _, resumed = setup()
    resumed.load_state_dict(saved)
    assert resumed.metrics()["epoch"] > optimizer.metrics()["epoch"]
    epoch = optimizer.metrics()["epoch"]
    optimizer.load_state_dict(saved)
    assert optimizer.metrics()["epoch"] > epoch, "also in the same process"


def test_the_keys_never_change():
    model, optimizer = setup(block_size=16)
    train(model, optimizer, range(12))
    state = optimizer.state_dict()
    assert set(state) == {"state", "param_groups"}
    assert set(state["state"][0]) == {
        "step",
        "exp_avg",
        "second_moment",
        "momentum_buffer",
        "block.0:7,0:5.updates",
        "block.0:7,0:5.version",
        "block.0:7,0:5.first_adopted",
        "block.0:7,0:5.last_snapshot",
        "block.0:7,0:5.statistics.0",
        "block.0:7,0:5.statistics.1",
        "block.0:7,0:5.preconditioner.0",
        "block.0:7,0:5.preconditioner.1",
        "block.0:7,0:5.in_flight.steps",
        "block.0:7,0:5.in_flight.0",
        "block.0:7,0:5.in_flight.1",
    }
    in_flight = state["state"][0]["block.0:7,0:5.in_flight.steps"].tolist()
    assert in_flight == [9, 12, -1]
    assert set(state["param_groups"][0]) == {
        "params",
        "param_names",
        "lr",
        "beta1",
        "momentum",
        "dampening",
        "nesterov",
        "weight_decay",
        "decoupled_weight_decay",
        "maximize",
        "grafting",
        "statistics",
        "blocking",
        "root",
        "preconditioner_format",
        "preconditioner_step",
        "preconditioner_epoch",
        "preconditioner_shards",
    }
    assert state["param_groups"][0]["preconditioner_format"] == 1


def test_averages_of_blocks_have_a_key_of_their_own_and_so_has_their_setting():
    model, optimizer = setup(block_size=16, **AVERAGES)
    train(model, optimizer, range(12))
    state = optimizer.state_dict()
    assert state["state"][0]["block.0:7,0:5.average"].shape == (7, 5)
    assert state["state"][0]["block.0:7,0:5.average"].count_nonzero() == 35
    assert state["param_groups"][0]["momentum_of"] == "preconditioned"


@pytest.mark.parametrize("steps", [0, 4])
def test_the_averages_of_one_order_are_none_of_the_other(steps):
    made = {}
    for order, settings in ("grafted", {}), ("preconditioned", AVERAGES):
        model, optimizer = made[order] = setup(**settings)
        train(model, optimizer, range(steps))
    for saved, running in ("grafted", "preconditioned"), ("preconditioned", "grafted"):
        model, optimizer = made[running]
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(
            ValueError,
            match=rf"group 0 of the checkpoint was saved with momentum_of='{saved}', .* has '{running}'",
        ):
            optimizer.load_state_dict(through_a_file(made[saved][1].state_dict()))
        assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_a_saved_order_with_what_it_does_not_go_with_is_refused():
    state = setup(**AVERAGES)[1].state_dict()
    for spoilt, message in (
        ({"nesterov": True}, "group 0 of the checkpoint: momentum_of='preconditioned' has no nesterov form"),
        ({"dampening": 1.0}, "group 0 of the checkpoint: momentum_of='preconditioned' needs dampening < 1"),
    ):
        broken = {**state, "param_groups": [{**state["param_groups"][0], **spoilt}]}
        with pytest.raises(ValueError, match=message):
            setup(**AVERAGES)[1].load_state_dict(broken)


@pytest.mark.parametrize("key", ["momentum_buffer", BLOCK + "average"])
def test_averages_that_lack_a_half_are_refused(key):
    model, optimizer = setup(**AVERAGES)
    train(model, optimizer, range(6))
    state = optimizer.state_dict()
    del state["state"][0][key]
    with pytest.raises(ValueError, match=rf"0\.weight: the checkpoint lacks '{key}'"):
        setup(**AVERAGES)[1].load_state_dict(state)


def test_a_saved_state_does_not_change_with_training():
    model, optimizer = setup()
    train(model, optimizer, range(8))
    state = optimizer.state_dict()
    kept = {
        k: v.clone() for k, v in state["state"][0].items() if k.startswith("block") and torch.is_tensor(v)
    }
    train(model, optimizer, range(8, 16))
    for key, value in kept.items():
        assert torch.equal(state["state"][0][key], value)


def test_a_parameter_that_had_no_gradient_yet_is_fine():
    model, optimizer = setup(staleness=StalenessConfig(refresh_every=2, max_staleness=9))
    frozen = model[2].weight
    for step in range(5):
        train(model, optimizer, [step])
        frozen.grad = None
    _, other = setup()
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    untouched, fresh = setup()
    fresh.load_state_dict(through_a_file(setup()[1].state_dict()))
    train(untouched, fresh, range(3))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s["param_groups"][0].update(preconditioner_format=99), "preconditioner_format 99"),
        (lambda s: s["state"][0].update(exp_avg=torch.zeros(2, 2)), r"0\.weight: exp_avg has shape \(2, 2\)"),
        (lambda s: s["state"][0].update(surprise=torch.zeros(1)), r"0\.weight: .* unknown key 'surprise'"),
        (lambda s: s["state"][0].update(exp_avg=[0.0]), r"0\.weight: exp_avg .* must be a tensor, not \[0"),
        (lambda s: s["state"][0].update(step="6"), r"0\.weight: step .* must be a number, not '6'"),
        *(
            (lambda s, key=key: s["state"][0].pop(key), rf"0\.weight: the checkpoint lacks '{key}'")
            for key in ("step", "exp_avg", "second_moment")
        ),
        *(
            (
                lambda s, key=key: s["state"][0].pop(BLOCK + key),
                rf"0\.weight: the checkpoint lacks '{BLOCK}{key}'",
            )
            for key in ("version", "last_snapshot", "statistics.0", "preconditioner.1", "in_flight.1")
        ),
        *(
            (lambda s, key=key: s["state"][0].update({BLOCK + key: torch.zeros(2, 9)}), rf"{key} has shape")
            for key in ("statistics.0", "in_flight.steps", "in_flight.0")
        ),
        *(
            (lambda s, key=key: s["state"][0].update({BLOCK + key: 0.5}), rf"0\.weight: \S+{key} .* a tensor")
            for key in ("statistics.0", "in_flight.steps", "in_flight.0")
        ),
        (lambda s: s["state"][0].update({BLOCK + "version": None}), r"0\.weight: \S+version .* a number"),
        (lambda s: s["param_groups"][0]["params"].pop(), r"group of 3 .* has 4; they differ from 2\.bias on"),
        (
            lambda s: s["param_groups"][0]["params"].append(4),
            r"group of 5 .* has 4; they differ from par\S+ 4",
        ),
        (
            lambda s: s["param_groups"][0].update(
                params=[1, 2, 3], param_names=["0.bias", "2.weight", "2.bias"]
            ),
            r"differ from 0\.weight on",
        ),
        (lambda s: s["param_groups"].append(s["param_groups"][0]), "2 groups of parameters, the optimizer 1"),
        *(
            (lambda s, key=key: s.pop(key), f"lacks '{key}': it is no complete state_dict")
            for key in ("state", "param_groups")
        ),
        *(
            (lambda s, key=key: s["param_groups"][0].pop(key), f"the checkpoint lacks '{key}'")
            for key in ("params", "preconditioner_step", "preconditioner_epoch")
        ),
        *(
            (lambda s, key=key: s["param_groups"][0].pop(key), f"lacks the setting '{key}' of group 0")
            for key in SETTINGS
        ),
        *(
            (
                lambda s, key=key, value=value: s["param_groups"][0].update({key: value}),
                rf"group 0 of the checkpoint: {key} must be .*; mend it in state_dict\['param_groups'\]\[0\]",
            )
            for key, value in (
                *((key, "x") for key in SETTINGS),
                ("lr", float("nan")),
                ("beta1", 1.0),
                ("momentum", -0.1),
            )
        ),
        *(
            (
                lambda s, key=key, value=value: s["param_groups"][0].update({key: value}),
                f"{key} .* whole number",
            )
            for key, value in (
                ("preconditioner_step", -1),
                ("preconditioner_step", "6"),
                ("preconditioner_epoch", 0.5),
                ("preconditioner_shards", 0),
            )
        ),
        (lambda s: s["param_groups"][0].update(momentun=0.9), r"unknown keys in group 0: \['momentun'\]"),
        (lambda s: s["param_groups"][0].pop("preconditioner_format"), "another\\s+optimizer"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_changes(spoil, message):
    model, optimizer = setup()
    train(model, optimizer, range(6))
    state = through_a_file(optimizer.state_dict())
    spoil(state)
    other_model, other = setup()
    train(other_model, other, range(2))
    before = through_a_file(other.state_dict())
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(state)
    assert other.metrics()["step"] == 2
    after = other.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(torch.equal(after["state"][i]["exp_avg"], s["exp_avg"]) for i, s in before["state"].items())


@pytest.mark.parametrize("value", [1, "1", None])
def test_keys_that_others_left_in_a_group_are_loaded(value):
    """Those of torch's schedulers always; any other where the running group has it, too."""
    model, optimizer = setup()
    train(model, optimizer, range(2))
    optimizer.param_groups[0].update(initial_lr=0.1, max_momentum=0.95, lr=0.0, of_somebody=value)
    state = through_a_file(optimizer.state_dict())
    _, other = setup()
    with pytest.raises(ValueError, match="of_somebody"):
        other.load_state_dict(state)
    other.param_groups[0]["of_somebody"] = None
    other.load_state_dict(state)
    assert other.param_groups[0]["of_somebody"] == value
    assert other.param_groups[0]["lr"] == 0.0


@pytest.mark.parametrize("key", ["preconditioner_step", "preconditioner_epoch", "state"])
def test_an_attached_preconditioner_refuses_a_checkpoint_that_lacks_a_key(key):
    model = nn.Linear(3, 2)
    handle = attach(torch.optim.SGD(model.parameters(), lr=0.1), service=LocalExchange())
    state = handle.state_dict()
    del state[key]
    with pytest.raises(ValueError, match=f"the checkpoint lacks '{key}'"):
        handle.load_state_dict(state)


def test_a_checkpoint_of_another_grafting_lacks_the_moment_that_this_one_needs():
    """At 0 beside an advanced count of steps its bias correction would lengthen steps many times over."""

    def grafted(method):
        parameter = nn.Parameter(torch.ones(3, 2))
        optimizer = Shampoo([parameter], grafting=GraftingConfig(method=method), service=LocalExchange())
        return parameter, optimizer

    parameter, optimizer = grafted("sgd")
    for _ in range(3):
        parameter.grad = torch.ones(3, 2)
        optimizer.step()
    state = optimizer.state_dict()
    _, other = grafted("adam")
    with pytest.raises(ValueError, match=r"lacks 'second_moment'.* after 3 updates: load .*sgd"):
        other.load_state_dict(state)
    assert not other.state
    grafted("lars")[1].load_state_dict(state)
    del state["state"][0]
    other.load_state_dict(state)
    assert other.metrics()["step"] == 3


def test_a_setting_changed_after_the_last_step_does_not_make_a_checkpoint_incomplete():
    parameter = nn.Parameter(torch.ones(3, 2))
    optimizer = Shampoo([parameter], beta1=0.0, service=LocalExchange())
    parameter.grad = torch.ones(3, 2)
    optimizer.step()
    optimizer.param_groups[0].update(beta1=0.9, momentum=0.5)
    Shampoo([parameter], service=LocalExchange()).load_state_dict(through_a_file(optimizer.state_dict()))


@pytest.mark.parametrize("hooked", [False, True])
def test_the_state_of_another_optimizer_is_refused_with_the_way_out(hooked):
    parameter = nn.Parameter(torch.randn(3, 2))
    adamw = torch.optim.AdamW([parameter])
    if hooked:
        attach(adamw, service=LocalExchange())
    parameter.grad = torch.ones(3, 2)
    adamw.step()
    before = parameter.detach().clone()
    optimizer = Shampoo([parameter], service=LocalExchange())
    with pytest.raises(ValueError, match=r"written by another optimizer.* Load the model's weights alone"):
        optimizer.load_state_dict(adamw.state_dict())
    optimizer.step()
    assert not torch.equal(parameter, before)


def test_another_cut_into_blocks_is_refused_by_name():
    model, optimizer = setup(block_size=4)
    train(model, optimizer, range(6))
    _, other = setup(block_size=16)
    with pytest.raises(ValueError, match=r"0\.weight"):
        other.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("value", [np.float64(0.01), np.float32(0.01), np.array(0.01)])
def test_numbers_of_numpy_are_saved_as_python_s(value):
    parameter = nn.Parameter(torch.ones(3, 2))
    group = {"params": [parameter], "weight_decay": value, "lr_scale": value}
    optimizer = Shampoo([group], lr=value, service=LocalExchange())
    assert type(optimizer.param_groups[0]["lr"]) is float
    parameter.grad = torch.ones(3, 2)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = value  # as a scheduler does whose factor is numpy's
    saved = through_a_file(optimizer.state_dict())["param_groups"][0]
    assert saved["lr"] == saved["weight_decay"] == saved["lr_scale"] == float(value)
