"""Training on an accelerator: the numbers of the CPU, and a host that never waits."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from preconditioner_client import (
    BlockingConfig,
    Grafting,
    GraftingConfig,
    LocalExchange,
    Shampoo,
    StalenessConfig,
    attach,
)
from scripted_exchange import ScriptedExchange

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
CUDA = torch.device("cuda")
SCHEDULED = StalenessConfig(refresh_every=2, adoption="scheduled", delay=4, max_staleness=20)


@contextlib.contextmanager
def no_waiting():
    """Whatever would make the host wait for the accelerator raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def task(device, width=16):
    """Model and loss; made on the CPU, so that every device has the same numbers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 4))
    x, y = torch.randn(64, 6).to(device), torch.randn(64, 4).to(device)
    model.to(device)
    return model, lambda: nn.functional.mse_loss(model(x), y)


def backward(model, loss):
    model.zero_grad()
    loss().backward()


def trained(device, steps=30, **settings):
    model, loss = task(CUDA)
    optimizer = Shampoo(
        model.named_parameters(), lr=1e-2, service=LocalExchange(), staleness=SCHEDULED, **settings
    )
    for _ in range(steps):
        backward(model, loss)
        optimizer.step()
    return [parameter.detach().cpu() for parameter in model.parameters()], optimizer


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"weight_decay": 0.1, "momentum": 0.9, "nesterov": True},
        {"blocking": BlockingConfig(block_size=4, merge_dims=False)},
        {"grafting": GraftingConfig(method=Grafting.LAMB)},
        {"grafting": GraftingConfig(method=Grafting.ADAGRAD, blend_steps=5)},
    ],
    ids=["plain", "momentum", "blocks", "lamb", "blend"],
)
def test_a_schedule_gives_the_numbers_of_the_cpu(settings):
    here, _ = trained(torch.device("cpu"), **settings)
    there, optimizer = trained(CUDA, **settings)
    assert optimizer.metrics()["versions_adopted"] > 0
    for expected, found in zip(here, there, strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-4)


def test_no_step_makes_the_host_wait():
    model, loss = task(CUDA)
    exchange = ScriptedExchange()
    optimizer = Shampoo(
        model.named_parameters(),
        lr=1e-2,
        service=exchange,
        staleness=StalenessConfig(refresh_every=1, max_staleness=100),
    )
    for step in range(12):
        backward(model, loss)
        if step < 3:  # at the first steps memory is allocated and kernels are loaded
            optimizer.step()
            continue
        with no_waiting():
            optimizer.step()
        for block in range(len(exchange.session.blocks)):
            exchange.answer(block, optimizer.metrics()["step"])
    assert exchange.offered
    assert optimizer.metrics()["versions_adopted"] > 0


def test_an_attached_optimizer_does_not_wait_either():
    model, loss = task(CUDA)
    exchange = ScriptedExchange()
    inner = torch.optim.SGD(model.parameters(), lr=1e-2)
    attach(
        inner,
        model,
        service=exchange,
        staleness=StalenessConfig(refresh_every=1, max_staleness=100),
        grafting=GraftingConfig(method=Grafting.SGD),
    )
    for step in range(8):
        backward(model, loss)
        with no_waiting() if step >= 3 else contextlib.nullcontext():
            inner.step()
        for block in range(len(exchange.session.blocks)):
            exchange.answer(block, step + 1)


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted():
    model, loss = task(CUDA)
    optimizer = Shampoo(model.named_parameters(), lr=1e-2, service=LocalExchange(), staleness=SCHEDULED)
    for _ in range(3):
        backward(model, loss)
        optimizer.step()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    backward(model, loss)
    model[0].weight.grad[0, 0] = float("inf")
    optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))
    torch.cuda.synchronize()
    backward(model, loss)
    optimizer.step()
    assert optimizer.metrics()["nonfinite_steps"] == 1


def test_a_state_dict_goes_from_device_to_device():
    _, optimizer = trained(torch.device("cpu"))
    model, loss = task(CUDA)
    resumed = Shampoo(model.named_parameters(), lr=1e-2, service=LocalExchange(), staleness=SCHEDULED)
    resumed.load_state_dict(optimizer.state_dict())
    backward(model, loss)
    resumed.step()
    tensors = [
        value for state in resumed.state.values() for value in state.values() if torch.is_tensor(value)
    ]
    assert tensors
    # Counters are 0-D and may stay with the host.
    assert {tensor.device.type for tensor in tensors if tensor.dim() > 0} == {"cuda"}


def test_launches_do_not_grow_with_equal_blocks():
    def launches(layers):
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.randn(8, 8, device=CUDA)) for _ in range(layers)]
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
