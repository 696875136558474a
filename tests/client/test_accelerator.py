"""Training on an accelerator: the numbers of the CPU, and no other device touched."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from accelerators import NEEDS_CUDA
from fake_front import until
from guarded_training import SETTINGS, make_model, make_optimizer, set_gradients, weights_of
from kfac_models import Convolutional, Words, batch, loss_of, seeded
from preconditioner_client import (
    KFAC,
    LocalExchange,
    Shampoo,
    StalenessConfig,
    attach,
)
from preconditioner_client import engine as engine_module
from scripted_exchange import ScriptedExchange

SCHEDULED = StalenessConfig(refresh_every=2, adoption="scheduled", delay=4, max_staleness=20)
OFTEN = StalenessConfig(refresh_every=1, max_staleness=100)


@pytest.fixture
def as_guarded(monkeypatch):
    """Within it the CPU takes the steps of an accelerator, which round a little differently from its own."""

    @contextlib.contextmanager
    def taken():
        with monkeypatch.context() as patches:
            patches.setattr(engine_module, "is_deferred", lambda device: True)
            yield

    return taken


def assert_equal(accelerator, found, expected):
    for there, here in zip(found, expected, strict=True):
        assert here.isfinite().all()
        if accelerator.is_exact:
            assert torch.equal(there, here), f"up to {(there - here).abs().max()}"
        else:
            # Sums in another order are told apart by roots, and half precision keeps 8 bits.
            torch.testing.assert_close(there, here, rtol=2e-2, atol=2e-3)


# -- the numbers ---------------------------------------------------------------------------------------


def trained(device, dtype=torch.float32, steps=range(16), within=contextlib.nullcontext, **settings):
    model = make_model(dtype, device)
    optimizer = make_optimizer(model.named_parameters(), **({"staleness": SCHEDULED} | settings))
    return train(model, optimizer, steps, within), optimizer


def train(model, optimizer, steps, within=contextlib.nullcontext):
    """The weights after some steps, each within what ``within`` gives."""
    for step in steps:
        set_gradients(model, step, without={1, 2} if step % 3 == 2 else ())
        with within():
            optimizer.step()
    return weights_of(model)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in SETTINGS), ("lamb", torch.bfloat16), ("momentum", torch.float64)],
)
def test_a_schedule_gives_the_numbers_of_the_cpu(accelerator, as_guarded, name, dtype):
    with as_guarded():
        here, _ = trained("cpu", dtype, **SETTINGS[name])
    there, optimizer = trained(accelerator.device, dtype, **SETTINGS[name])
    assert optimizer.metrics()["versions_adopted"] > optimizer.metrics()["blocks"]
    assert_equal(accelerator, there, here)


def test_a_copy_that_is_not_there_when_it_is_due_is_waited_for(pretended, as_guarded):
    with as_guarded():
        here, _ = trained("cpu", service=LocalExchange(SCHEDULED.delay))
    there, optimizer = trained(pretended.device, service=LocalExchange(SCHEDULED.delay))
    assert optimizer.metrics()["waits"] > 0
    assert optimizer.metrics()["late_adoptions"] == optimizer.metrics()["wait_timeouts"] == 0
    assert_equal(pretended, there, here)


def trained_layers(kind, device, within=contextlib.nullcontext):
    model = seeded(kind).to(device)
    optimizer = KFAC(model, service=LocalExchange(2), staleness=SCHEDULED)
    for step in range(14):
        inputs, targets = (tensor.to(device) for tensor in batch(model, step))
        with within():
            optimizer.zero_grad()
            loss_of(model, inputs, targets).backward()
            optimizer.step()
    return weights_of(model), optimizer


@pytest.mark.parametrize("kind", [Convolutional, Words])
def test_so_it_is_with_layers(accelerator, as_guarded, kind):
    with as_guarded():
        here, _ = trained_layers(kind, "cpu")
    there, optimizer = trained_layers(kind, accelerator.device)
    assert optimizer.metrics()["blocks_with_version"] == optimizer.metrics()["blocks"]
    assert_equal(accelerator, there, here)


def test_a_run_goes_from_device_to_device(accelerator, as_guarded):
    """With snapshots of its schedule under way."""
    with as_guarded():
        here, _ = trained("cpu", steps=range(18))
    weights, optimizer = trained("cpu", steps=range(0))
    for device, steps in (("cpu", range(7)), (accelerator.device, range(7, 13)), ("cpu", range(13, 18))):
        state_dict = optimizer.state_dict()
        for state in state_dict["state"].values():
            # Whoever puts counts into tensors makes no step wait for them.
            state.update({"step": torch.tensor(state["step"])} if "step" in state else {})
        model = make_model(device=device)
        with torch.no_grad():
            for parameter, weight in zip(model.parameters(), weights, strict=True):
                parameter.copy_(weight)
        optimizer = make_optimizer(model.named_parameters(), staleness=SCHEDULED)
        optimizer.load_state_dict(state_dict)
        with as_guarded() if device == "cpu" else contextlib.nullcontext():
            weights = train(model, optimizer, steps)
        state = optimizer.state_dict()["state"].values()
        assert {v.device for s in state for v in s.values() if torch.is_tensor(v)} == {torch.device(device)}
        assert all(isinstance(s["step"], int) for s in state)
    assert_equal(accelerator, weights, here)


# -- which device --------------------------------------------------------------------------------------


def test_another_device_than_the_current_one(pretended, as_guarded):
    """Nothing is made on the current device, and nothing of it is used."""
    with as_guarded():
        here, _ = trained("cpu", momentum=0.9)
    device = torch.device("cuda", 1)
    there, optimizer = trained(device, momentum=0.9)
    assert_equal(pretended, there, here)
    state = optimizer.state_dict()["state"].values()
    assert {v.device for of_one in state for v in of_one.values() if torch.is_tensor(v)} == {device}
    assert {stream.device for stream in pretended.runtime.streams} == {device}


def test_the_threads_of_an_exchange_work_on_the_device_of_its_blocks(pretended, front, connect):
    """As in a process of several, one for each device: none takes memory on the first one."""
    torch.cuda.set_device(1)
    model = make_model(device=torch.device("cuda", 1))
    optimizer = make_optimizer(model.named_parameters(), service=connect(front.address), staleness=OFTEN)

    def stepped():
        set_gradients(model, optimizer.metrics()["step"])
        with pretended.no_waiting():
            optimizer.step()
        return optimizer.metrics()["blocks_with_version"] == optimizer.metrics()["blocks"]

    until(stepped, what="versions of all blocks")
    assert all(weight.isfinite().all() for weight in weights_of(model))
    assert pretended.runtime.contexts == {1}


def test_parameters_on_several_devices(pretended):
    """Such an optimizer looks at its gradients as on the CPU, and waits for it."""

    def train_all(devices):
        models = [make_model(device=device) for device in devices]
        parameters = [p for model in models for p in model.parameters()]
        optimizer = make_optimizer(parameters, staleness=SCHEDULED, weight_decay=0.1, momentum=0.9)
        for step in range(12):
            for number, model in enumerate(models):
                set_gradients(model, 2 * step + number)
            optimizer.step()
        assert optimizer.metrics()["versions_adopted"] > 0
        return [weight for model in models for weight in weights_of(model)]

    expected = train_all(["cpu"] * 3)
    assert_equal(pretended, train_all(["cuda:0", "cuda:1", "cpu"]), expected)


def test_a_learning_rate_on_one_of_several_devices(pretended):
    def train_all(devices, rate):
        models = [make_model(device=device) for device in devices]
        parameters = [p for model in models for p in model.parameters()]
        lr = torch.full((), 0.01, device=rate)
        optimizer = make_optimizer(parameters, lr=lr, staleness=SCHEDULED, weight_decay=0.1)
        for step in range(3):
            for model in models:
                set_gradients(model, step)
            optimizer.step()
        return [weight for model in models for weight in weights_of(model)]

    found = train_all(["cuda:0", "cuda:1", "cpu"], "cuda:0")
    for there, here in zip(found, train_all(["cpu"] * 3, "cpu"), strict=True):
        torch.testing.assert_close(there, here)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_program_may_have_other_defaults(accelerator, as_guarded, dtype):
    @contextlib.contextmanager
    def others():
        torch.set_default_dtype(dtype)
        try:
            with accelerator.device:
                yield
        finally:
            torch.set_default_dtype(torch.float32)

    with as_guarded():
        here, (layers_here, _) = trained("cpu", momentum=0.9)[0], trained_layers(Words, "cpu")
    there, optimizer = trained(accelerator.device, momentum=0.9, within=others)
    assert_equal(accelerator, there, here)
    assert_equal(accelerator, trained_layers(Words, accelerator.device, others)[0], layers_here)
    with others():
        state_dict = optimizer.state_dict()
    tensors = [v for s in state_dict["state"].values() for v in s.values() if torch.is_tensor(v)]
    assert {(t.device, t.dtype) for t in tensors if t.is_floating_point()} == {
        (accelerator.device, torch.float32)
    }


def test_steps_may_be_on_any_stream(accelerator, as_guarded):
    """As in the warm-up before a CUDA graph is captured: some are on a stream of their own."""
    with as_guarded():
        here, _ = trained("cpu", momentum=0.9, service=LocalExchange())
    model = make_model(device=accelerator.device)
    optimizer = make_optimizer(
        model.named_parameters(), staleness=SCHEDULED, momentum=0.9, service=LocalExchange()
    )
    default, other = torch.cuda.current_stream(accelerator.device), torch.cuda.Stream(accelerator.device)
    for step in range(16):
        stream, before = (other, default) if step % 5 == 1 else (default, other)
        stream.wait_stream(before)
        with torch.cuda.stream(stream):
            set_gradients(model, step, without={1, 2} if step % 3 == 2 else ())
            optimizer.step()
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.record_stream(other)
                    parameter.grad.record_stream(default)
    assert_equal(accelerator, weights_of(model), here)


def test_a_model_that_is_moved_after_the_first_step_is_refused(pretended):
    model = make_model()
    optimizer = make_optimizer(model.named_parameters())
    set_gradients(model, 0)
    optimizer.step()
    optimizer.zero_grad()
    for parameter in model.parameters():
        torch.utils.swap_tensors(parameter, nn.Parameter(parameter.detach().to(pretended.device)))
    set_gradients(model, 1)
    with pytest.raises(ValueError, match=r"0\.weight is on cuda:0, but was on cpu in the first step"):
        optimizer.step()


@pytest.mark.parametrize("attached", [False, True], ids=["shampoo", "attach"])
def test_a_step_is_not_captured_into_a_graph(pretended, monkeypatch, attached):
    model = make_model(torch.float32, torch.device("cuda", 0))
    if attached:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        attach(optimizer, model, service=LocalExchange())
    else:
        optimizer = make_optimizer(model.named_parameters())
    set_gradients(model, 1)
    before = weights_of(model)
    with monkeypatch.context() as patches:
        patches.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(RuntimeError, match="cannot be captured into a CUDA graph"):
            optimizer.step()
    assert all(map(torch.equal, before, weights_of(model)))
    optimizer.step()
    assert not any(map(torch.equal, before, weights_of(model)))


# -- launches ------------------------------------------------------------------------------------------


@NEEDS_CUDA
def test_launches_do_not_grow_with_equal_blocks():
    def launches(layers):
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.randn(8, 8, device="cuda")) for _ in range(layers)]
        optimizer = Shampoo(
            parameters, lr=1e-2, service=ScriptedExchange(), staleness=StalenessConfig(max_staleness=100)
        )
        for _ in range(3):
            for parameter in parameters:
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
            optimizer.step()
            torch.cuda.synchronize()
        return sum(event.count for event in recorded.key_averages() if event.key == "cudaLaunchKernel")

    few, many = launches(4), launches(16)
    assert many <= 1.2 * few
