"""Accelerators: no step waits for the device, and one with a gradient that is not finite has no effect.

There need be no accelerator. That nothing waits is shown on torch's meta device, whose tensors have no values
that anybody could wait for; what comes out, with CPU tensors that are treated as an accelerator's.
"""

from __future__ import annotations

import contextlib
import logging

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from preconditioner_client import (
    Arrival,
    BlockingConfig,
    GraftingConfig,
    LocalExchange,
    Shampoo,
    StalenessConfig,
    StatisticsConfig,
    attach,
    sharing,
    stack,
)
from preconditioner_client import engine as engine_module
from preconditioner_client import guard as guard_module
from preconditioner_client.distribution import Ranks
from scripted_exchange import ScriptedExchange

DEVICE = torch.device("meta")
STALENESS = StalenessConfig(refresh_every=2, max_staleness=20)

SETTINGS = {
    "default": {},
    "momentum": {"momentum": 0.9, "weight_decay": 0.1, "dampening": 0.5},
    "nesterov": {
        "momentum": 0.9,
        "nesterov": True,
        "beta1": 0.0,
        "grafting": GraftingConfig(method="rmsprop"),
    },
    "lamb": {"grafting": GraftingConfig(method="lamb", blend_steps=5), "weight_decay": 0.1},
    "lars": {"grafting": GraftingConfig(method="lars"), "maximize": True},
    "coupled sum": {
        "weight_decay": 0.1,
        "decoupled_weight_decay": False,
        "grafting": GraftingConfig(method="adagrad"),
        "statistics": StatisticsConfig(accumulation="sum", every=2),
    },
}
every_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


def make_model(dtype=torch.float32):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 12, 3), nn.Linear(12, 20), nn.LayerNorm(20), nn.Linear(20, 12)
    return nn.Sequential(*layers).to(dtype)


def parameters_without_values(dtype=torch.float32):
    shapes = (12, 3, 3, 3), (12,), (20, 12), (20,), (20,), (20,), (12, 20), (12,)
    return [nn.Parameter(torch.empty(shape, dtype=dtype, device=DEVICE)) for shape in shapes]


def make_optimizer(parameters, **settings):
    defaults = {"lr": 1e-2, "blocking": BlockingConfig(block_size=8), "staleness": STALENESS}
    return Shampoo(parameters, **(defaults | {"service": LocalExchange(1)} | settings))


def set_gradients(model, step, without=()):
    generator = torch.Generator().manual_seed(step)
    for index, parameter in enumerate(model.parameters()):
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = None if index in without else gradient.to(parameter.dtype)


# -- nothing waits -------------------------------------------------------------------------------------


class NothingWaits(TorchDispatchMode):
    """Refuses what makes the host wait for a device: copies from it, and to it from memory that may move."""

    _VALUES = ("nonzero", "_local_scalar_dense", "is_nonzero", "equal", "masked_select", "_unique2", "item")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        involved = {a.device for a in args if isinstance(a, torch.Tensor)}
        if name in self._VALUES and DEVICE in involved:
            raise AssertionError(f"{function} needs values of a device")
        result = function(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_", "_foreach_copy_") and isinstance(result, torch.Tensor):
            devices = involved | {result.device}
            non_blocking = (kwargs or {}).get("non_blocking") or (name == "copy_" and args[2:] == (True,))
            if len(devices) > 1 and not (result.device == DEVICE and non_blocking):
                raise AssertionError(f"{function} between {devices} makes the host wait")
        return result


class Arrived:
    """In place of a CUDA event; some copies are still under way when they are first asked for."""

    def __init__(self):
        self.asked = 0

    def query(self):
        self.asked += 1
        return self.asked > 2


class OnDevice(ScriptedExchange):
    """Answers all snapshots at once, on the device, as an uploading exchange does."""

    def offer(self, snapshots, step):
        super().offer(snapshots, step)
        for snapshot in snapshots:
            sides = tuple(torch.eye(n, device=DEVICE) for n in self.session.blocks[snapshot.block].sides)
            self.inbox.append(Arrival(snapshot.block, snapshot.step, sides))


@pytest.fixture
def on_device(monkeypatch):
    """What copies to the host, and what is done with it there, has a stand-in; nothing has values."""

    def to_host(tensor):
        assert tensor.device == DEVICE
        return torch.zeros(tensor.shape, dtype=tensor.dtype), Arrived()

    def made_on_the_host(data, **settings):
        if torch.device(settings.get("device") or "cpu") == DEVICE:
            raise AssertionError("torch.tensor copies to the device from memory that may move, and waits")
        return make(data, **settings)

    make = torch.tensor
    monkeypatch.setattr(torch, "tensor", made_on_the_host)
    for module in (guard_module, stack, sharing):
        monkeypatch.setattr(module, "to_host", to_host)
    monkeypatch.setattr(stack, "_without_autocast", lambda device: contextlib.nullcontext())
    # What a verdict says is looked at on the host; here it has no values there either.
    monkeypatch.setattr(guard_module.SkippedSteps, "poll", lambda self: None)
    monkeypatch.setattr(sharing.SharedUpdates, "_check", lambda self: None)


class Work:
    def wait(self):
        pass


def be_first_of_two(monkeypatch, bucket_bytes):
    """The first of two replicas, the other of which nobody runs."""
    ranks = Ranks(replicas=2, replica_group="both", grid=((0,), (1,)), bucket_bytes=bucket_bytes)
    monkeypatch.setattr(Ranks, "of", lambda *args: ranks)
    monkeypatch.setattr(engine_module, "agree", lambda ranks, epoch, job, *rest: (epoch, job))
    for name in ("all_gather_single", "all_gather_into_tensor"):
        monkeypatch.setattr(dist, name, lambda *args, **kwargs: Work(), raising=False)


def train_without_values(parameters, step, steps=6):
    for number in range(steps):
        for index, parameter in enumerate(parameters):
            # Some parameters have no gradient in some steps.
            missing = number % 3 == 2 and index in (0, 3)
            parameter.grad = None if missing else torch.empty_like(parameter)
        with NothingWaits():
            step()


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float32) for name in SETTINGS), ("momentum", torch.bfloat16)]
)
def test_no_step_waits_for_an_accelerator(on_device, name, dtype):
    parameters = parameters_without_values(dtype)
    exchange = OnDevice()
    optimizer = make_optimizer(parameters, **SETTINGS[name], service=exchange)
    train_without_values(parameters, optimizer.step)
    metrics = optimizer.metrics()
    assert metrics["versions_adopted"] > metrics["blocks"]
    assert len(exchange.offered) > metrics["blocks"]


@pytest.mark.parametrize("place", ["cpu", DEVICE])
def test_whatever_the_learning_rate_is(on_device, place):
    parameters = parameters_without_values()
    optimizer = make_optimizer(parameters, weight_decay=0.1, service=OnDevice())
    optimizer.param_groups[0]["lr"] = torch.full((), 0.01, device=place)
    # Only without any state the learning rate is asked whether the step is torch's for a checkpoint.
    for parameter in parameters:
        moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "second_moment")}
        optimizer.state[parameter] = {"step": 1, **moments}
    train_without_values(parameters, optimizer.step)


@pytest.mark.parametrize("bucket_bytes", [None, 600])
def test_nor_do_replicas(on_device, monkeypatch, bucket_bytes):
    be_first_of_two(monkeypatch, bucket_bytes)
    parameters = parameters_without_values()
    optimizer = make_optimizer(parameters, service=OnDevice())
    train_without_values(parameters, optimizer.step)
    assert optimizer.metrics()["versions_adopted"] > 0


@pytest.mark.parametrize("groups", [None, {1: None}])
@pytest.mark.parametrize("grafting", ["sgd", "adam"])
def test_nor_does_an_attached_preconditioner(on_device, grafting, groups):
    parameters = parameters_without_values()
    optimizer = torch.optim.SGD([{"params": parameters[:6]}, {"params": parameters[6:]}], lr=0.1)
    handle = attach(
        optimizer,
        groups=groups,
        grafting=GraftingConfig(method=grafting),
        blocking=BlockingConfig(block_size=8),
        staleness=STALENESS,
        service=OnDevice(),
    )
    # GradScaler leaves its verdict with a fused optimizer, which this one is not.
    optimizer.found_inf = torch.zeros((), device=DEVICE)
    optimizer.register_step_pre_hook(lambda *_: setattr(optimizer, "found_inf", None))
    train_without_values(parameters, optimizer.step)
    assert handle.metrics()["versions_adopted"] > 0


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.isfinite().all()),
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: torch.tensor([1, 2], device=x.device),
        lambda x: x.to("cpu", non_blocking=True),
        lambda x: x.tolist(),
    ],
)
def test_waiting_would_be_noticed(on_device, wait):
    x = torch.zeros(3, device=DEVICE)
    with pytest.raises((AssertionError, NotImplementedError, RuntimeError)), NothingWaits():
        wait(x)


# -- what comes out ------------------------------------------------------------------------------------


@pytest.fixture
def deferred(monkeypatch):
    """Call it, and the CPU is taken for an accelerator from then on."""

    def begin():
        monkeypatch.setattr(engine_module, "is_deferred", lambda device: True)

    return begin


def contents(optimizer):
    """All tensors of the state, by parameter and key."""
    return {
        (index, key): value.clone()
        for index, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
        if torch.is_tensor(value) and "preconditioner" not in key
    }


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in SETTINGS),
        *((name, dtype) for name in ("momentum", "lamb") for dtype in (torch.bfloat16, torch.float64)),
    ],
)
def test_a_bad_step_leaves_statistics_moments_and_weights_as_they_were(deferred, name, dtype, caplog):
    deferred()
    model = make_model(dtype=dtype)
    optimizer = make_optimizer(model.named_parameters(), **SETTINGS[name])
    for step in range(6):
        set_gradients(model, step)
        optimizer.step()
    before, weights = contents(optimizer), [p.detach().clone() for p in model.parameters()]
    assert optimizer.metrics()["nonfinite_steps"] == 0
    caplog.set_level(logging.WARNING, "preconditioner_client")
    for step, value in enumerate((float("nan"), float("inf"), -float("inf"))):
        set_gradients(model, step)
        model[3].weight.grad[2, 1] = value
        optimizer.step()
        after = contents(optimizer)
        assert after.keys() == before.keys()
        for key, old in before.items():
            assert torch.equal(after[key], old), key
        for parameter, old in zip(model.parameters(), weights, strict=True):
            assert torch.equal(parameter, old)
    assert optimizer.metrics()["nonfinite_steps"] == 3
    assert [r.getMessage().split(".")[0] for r in caplog.records] == [
        "step 7 had no effect: the gradient of 3"
    ]
    set_gradients(model, 7)
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    assert not torch.equal(model[3].weight, weights[5])


@every_setting
def test_the_very_first_step_may_be_bad(deferred, settings):
    deferred()
    model = make_model()
    weights = [p.detach().clone() for p in model.parameters()]
    optimizer = make_optimizer(model.named_parameters(), **settings)
    set_gradients(model, 0)
    model[0].bias.grad[0] = float("nan")
    optimizer.step()
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    for step in range(4):
        set_gradients(model, step)
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


@every_setting
def test_good_steps_are_those_of_the_cpu_but_for_rounding(deferred, settings):
    models = []
    for forced in (False, True):
        if forced:
            deferred()
        model = make_model()
        optimizer = make_optimizer(model.named_parameters(), **settings)
        for step in range(12):
            set_gradients(model, step, without={1, 2} if step % 3 == 2 else ())
            optimizer.step()
        assert optimizer.metrics()["versions_adopted"] > 0
        models.append(model)
    for parameter, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-3, atol=1e-5)


def test_an_attached_preconditioner_hands_on_zeros(deferred):
    deferred()
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = attach(
        optimizer,
        model,
        grafting=GraftingConfig(),
        blocking=BlockingConfig(block_size=8),
        staleness=STALENESS,
        service=LocalExchange(1),
    )
    for step in range(5):
        set_gradients(model, step)
        optimizer.step()
    weights = [p.detach().clone() for p in model.parameters()]
    set_gradients(model, 5)
    model[1].weight.grad[0, 0] = float("inf")
    optimizer.step()
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    assert handle.metrics()["nonfinite_steps"] == 1


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_groups_left_alone_take_part_in_a_bad_step_and_in_no_other(deferred, bad):
    """Half of a step is worse than none, whichever gradient is bad."""
    deferred()
    torch.manual_seed(0)
    table, layer = nn.Embedding(6, 4, sparse=True), nn.Linear(4, 8, bias=False)
    wave = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    parameters = table.weight, layer.weight, wave
    optimizer = torch.optim.SGD([{"params": [p]} for p in parameters], lr=0.1)
    handle = attach(
        optimizer,
        grafting=GraftingConfig(),
        groups={0: None, 2: None},
        staleness=STALENESS,
        service=LocalExchange(1),
    )
    # After the preconditioner's hook, and before the optimizer.
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append([p.grad.to_dense().clone() for p in parameters]))

    def backward(step):
        optimizer.zero_grad()
        loss = layer(table(torch.tensor([step % 6, 5]))).square().sum() + wave.abs().square().sum()
        loss.backward()
        return [p.grad.to_dense().clone() for p in parameters]

    for step in range(5):
        given = backward(step)
        optimizer.step()
        assert [torch.equal(a, b) for a, b in zip(seen[-1], given, strict=True)] == [True, False, True]
    weights = [p.detach().clone() for p in parameters]
    backward(5)
    gradient = parameters[bad].grad
    (gradient._values() if gradient.is_sparse else gradient)[0] = float("nan")
    optimizer.step()
    assert not any(bool(gradient.any()) for gradient in seen[-1])
    assert all(torch.equal(p, w) for p, w in zip(parameters, weights, strict=True))
    assert handle.metrics()["nonfinite_steps"] == 1


def test_a_scaler_s_verdict_on_a_fused_optimizer_is_taken_over(deferred):
    """GradScaler calls a fused optimizer in any case, and leaves the verdict with it."""
    deferred()
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    handle = attach(optimizer, model, staleness=STALENESS, service=LocalExchange(1))
    set_gradients(model, 0)
    optimizer.step()
    before = {k: v for s in handle.state_dict()["state"] for k, v in s.items() if "statistics" in k}
    weights = [p.detach().clone() for p in model.parameters()]
    set_gradients(model, 1)
    optimizer.grad_scale, optimizer.found_inf = None, torch.ones(())
    optimizer.step()
    after = {k: v for s in handle.state_dict()["state"] for k, v in s.items() if "statistics" in k}
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
