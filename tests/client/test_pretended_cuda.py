"""What the pretended accelerator refuses: each of these is a mistake on a real one."""

from __future__ import annotations

import contextlib
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from preconditioner_client.transfer import side_stream, to_host, upload
from pretend_cuda import pretended_cuda

FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)


@pytest.fixture
def x(pretended):
    return torch.arange(6.0, device=FIRST)


def test_it_has_values(pretended, x):
    view = x.view(2, 3)[1]
    view.mul_(2.0)
    assert x.tolist() == [0, 1, 2, 6, 8, 10]
    assert x.device == FIRST
    assert x.is_cuda
    y = x.detach().requires_grad_()
    (y * y).sum().backward()
    assert torch.equal(y.grad.cpu(), 2 * x.cpu())


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x + torch.ones(6),
        lambda x: x + torch.ones(6, device=SECOND),
        lambda x: x + torch.ones((), device=SECOND),
        lambda x: torch._foreach_add_([x], [torch.ones(6)]),
        lambda x: torch._foreach_mul_([x], torch.ones((), device=SECOND)),
        lambda x: torch.cat([x, torch.ones(1)]),
        lambda x: x.index_select(0, torch.tensor([1])),
    ],
)
def test_tensors_of_two_devices(x, mix):
    with pytest.raises(RuntimeError, match="same device"):
        mix(x)


def test_numbers_of_the_host_and_lists_of_several_devices_are_taken(pretended, x):
    assert (x + torch.ones(())).tolist() == [1, 2, 3, 4, 5, 6]
    others = [torch.ones(2, device=SECOND), torch.ones(2)]
    torch._foreach_add_([x, *others], 1.0)
    norms = torch._foreach_norm([x, *others])
    assert [norm.device.type for norm in norms] == ["cuda", "cuda", "cpu"]
    assert others[0].tolist() == others[1].tolist() == [2, 2]


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.isfinite().all()),
        lambda x: float(x[0]),
        lambda x: x.cpu(),
        lambda x: x.tolist(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.equal(x, x),
        lambda x: x.to("cpu", non_blocking=True),
        lambda x: torch.tensor([1, 2], device=x.device),
        lambda x: torch.ones(2).to(x.device, non_blocking=True),
        lambda x: torch.ones(2).pin_memory().to(x.device),
        lambda x: x.copy_(torch.ones(6)),
        lambda x: torch.empty(6, pin_memory=True).copy_(x),
        lambda x: torch.empty(6).copy_(x, non_blocking=True),
        lambda x: torch.empty(6, 2, pin_memory=True)[:, 0].copy_(x, non_blocking=True),
        lambda x: torch.empty(6, dtype=torch.float64, pin_memory=True).copy_(x, non_blocking=True),
        lambda x: torch.cuda.current_stream(x.device).synchronize(),
    ],
)
def test_waiting(pretended, x, wait):
    with pytest.raises(RuntimeError, match="host"), pretended.no_waiting():
        wait(x)


def test_what_is_no_waiting(pretended, x):
    with pretended.no_waiting():
        x.add_(upload([1.0] * 6, torch.float32, FIRST))
        x[2:4] = 0.0
        x.masked_fill_(x > 3, 1.0)
        _, ready = to_host(x)
        ready.query()


def test_numpy_knows_no_accelerator(x):
    with pytest.raises(TypeError, match="cuda:0"):
        x.numpy()


def test_a_copy_is_not_there_before_its_event(pretended, x):
    host, ready = to_host(x)
    assert host.isnan().all()
    assert [ready.query() for _ in range(pretended.runtime.lag)] == [False] * pretended.runtime.lag
    assert host.isnan().all()
    assert ready.query()
    assert host.tolist() == [0, 1, 2, 3, 4, 5]


def test_work_that_may_come_before_what_it_reads(pretended, x):
    stream = torch.cuda.Stream(FIRST)
    with pytest.raises(RuntimeError, match="may come before"), torch.cuda.stream(stream):
        x.add(1)
    stream.wait_stream(torch.cuda.current_stream(FIRST))
    with torch.cuda.stream(stream):
        y = x.add(1)
    with pytest.raises(RuntimeError, match="may overwrite"):
        x.add_(1)
    event = stream.record_event()
    torch.cuda.current_stream(FIRST).wait_event(event)
    x.add_(1).add_(y)
    y.record_stream(torch.cuda.current_stream(FIRST))


def test_what_the_host_knows_to_be_done_is_no_race(pretended, x):
    stream = torch.cuda.Stream(FIRST)
    stream.wait_stream(torch.cuda.current_stream(FIRST))
    with torch.cuda.stream(stream):
        event = torch.cuda.Event()
        x.add_(1)
        event.record(stream)
    event.synchronize()
    x.add_(1)
    assert x.tolist() == [2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("recorded", [False, True])
def test_memory_that_another_stream_still_uses(recorded):
    refused = pytest.raises(AssertionError, match="freed")
    with contextlib.nullcontext() if recorded else refused, pretended_cuda():
        x, stream = torch.ones(3, device=FIRST), torch.cuda.Stream(FIRST)
        stream.wait_stream(torch.cuda.current_stream(FIRST))
        with torch.cuda.stream(stream):
            x.sum()
        if recorded:
            x.record_stream(stream)
        del x


def test_page_locked_memory_that_changes_under_a_copy():
    with pytest.raises(AssertionError, match="changed while"), pretended_cuda() as pretended:
        host = torch.ones(3).pin_memory()
        kept = host.to(FIRST, non_blocking=True)
        host.numpy()[0] = 7.0
        pretended.synchronize()
        del kept


def test_threads_look_while_others_launch(pretended):
    """As those of an exchange, and a trainer; a copy ends in whichever thread looks."""
    stream = torch.cuda.Stream(FIRST)

    def arrived(target, event):
        while not event.query():
            pass
        return target.tolist()

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool, torch.cuda.stream(stream):
            found = []
            for value in range(400):
                target = torch.empty(3).pin_memory()
                target.copy_(torch.full((3,), float(value), device=FIRST), non_blocking=True)
                found.append(pool.submit(arrived, target, stream.record_event()))
            assert [one.result() for one in found] == [[float(value)] * 3 for value in range(400)]
    finally:
        sys.setswitchinterval(before)


def test_devices_on_which_a_context_is_made(pretended):
    torch.ones(3, device=SECOND)
    assert pretended.runtime.contexts == {1}
    _, ready = to_host(torch.ones(3, device=SECOND))
    with torch.cuda.device(1):
        ready.query()
    assert side_stream(SECOND, inward=False).device == SECOND
    # to_host() is the training thread's, and asks for page-locked memory where that thread is.
    assert pretended.runtime.contexts == {0, 1}
