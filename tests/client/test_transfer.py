"""Copies to and from an accelerator."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from preconditioner_client import Rejection, SessionSpec
from preconditioner_client.config import Ridge, RidgeKind
from preconditioner_client.exchange import BlockSpec
from preconditioner_client.inbox import unpack_arrival
from preconditioner_client.transfer import UploadingExchange, to_host, upload
from preconditioner_protos import PackedBlock
from scripted_exchange import ScriptedExchange

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
RIDGE = Ridge(kind=RidgeKind.RELATIVE, value=1e-6)


class Copy:
    """A copy under way that ends when the test says so."""

    def __init__(self):
        self.done = False
        self.waited_for = False

    def query(self):
        return self.done

    def synchronize(self):
        self.waited_for = self.done = True


class HeldCopies(UploadingExchange):
    """An exchange whose copies are in the hand of the test: none of this is about what CUDA does."""

    def __init__(self, inner, devices):
        super().__init__(inner, devices)
        self.copies = []

    def _upload(self, arrival):
        self.copies.append(Copy())
        return arrival, self.copies[-1]


@pytest.fixture
def inner():
    return ScriptedExchange()


@pytest.fixture
def exchange(inner):
    exchange = HeldCopies(inner, [CUDA, CUDA, CPU])
    exchange.open(session(blocks=3))
    return exchange


def session(blocks, devices=()):
    specs = tuple(BlockSpec(f"w[{i}]", (2,), (4.0,), RIDGE) for i in range(blocks))
    return SessionSpec(job="job", epoch=0, blocks=specs, devices=tuple(devices))


def versions(collected):
    return [(event.block, event.step) for event in collected]


def test_an_arrival_is_given_out_once_its_copy_is_done(exchange, inner):
    inner.answer(0, 7)
    assert exchange.collect(8) == []
    exchange.copies[0].done = True
    assert versions(exchange.collect(9)) == [(0, 7)]
    assert exchange.collect(10) == []


def test_a_newer_copy_that_is_done_first_does_not_overtake(exchange, inner):
    inner.answer(0, 7)
    inner.answer(0, 9)
    exchange.collect(10)
    exchange.copies[1].done = True
    assert exchange.collect(11) == []
    exchange.copies[0].done = True
    assert versions(exchange.collect(12)) == [(0, 7), (0, 9)]


def test_what_stays_on_the_host_does_not_wait_for_copies(exchange, inner):
    inner.answer(0, 7)
    inner.answer(2, 7)
    inner.refuse(1, 7)
    first, second = exchange.collect(8)
    assert (first.block, first.step) == (2, 7)
    assert isinstance(second, Rejection)
    assert second.block == 1


def test_waiting_is_for_the_oldest_copy_before_it_is_for_the_service(exchange, inner):
    assert not exchange.wait(1.0)
    assert inner.waits == [1.0]
    inner.answer(1, 3)
    exchange.collect(4)
    assert exchange.wait(1.0)
    assert exchange.copies[0].waited_for
    assert inner.waits == [1.0]


def test_a_new_session_and_the_end_drop_what_is_under_way(exchange, inner):
    inner.answer(0, 7)
    exchange.collect(8)
    exchange.open(session(blocks=3))
    exchange.copies[0].done = True
    assert exchange.collect(9) == []


def test_on_the_cpu_nothing_is_copied():
    tensor = torch.arange(3.0)
    host, ready = to_host(tensor)
    assert host is tensor
    assert ready is None


def packed(n):
    values = np.arange(n * (n + 1) // 2, dtype=np.float32)
    return PackedBlock(block=0, step=5, sides=(values,))


def test_an_arrival_on_the_host_is_in_ordinary_memory():
    assert not unpack_arrival(packed(3), (3,)).sides[0].is_pinned()


def test_where_there_is_no_page_locked_memory_ordinary_memory_serves(monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("cannot pin")

    monkeypatch.setattr(torch, "empty", refuse)
    plain, instead = (unpack_arrival(packed(3), (3,), device).sides[0] for device in (CPU, CUDA))
    assert torch.equal(plain, instead)


def test_an_arrival_for_an_accelerator_is_in_page_locked_memory(accelerator):
    plain, pinned = (unpack_arrival(packed(3), (3,), device).sides[0] for device in (CPU, accelerator.device))
    assert pinned.is_pinned()
    assert torch.equal(plain, pinned)


def test_a_thread_that_locks_memory_makes_no_context_on_another_device(pretended):
    arguments = packed(3), (3,), torch.device("cuda", 1)
    thread = threading.Thread(target=unpack_arrival, args=arguments)
    thread.start()
    thread.join()
    assert pretended.runtime.pinned
    assert pretended.runtime.contexts == {1}


def test_a_preconditioner_comes_to_the_device(accelerator, inner):
    exchange = UploadingExchange(inner, [accelerator.device])
    exchange.open(session(1, [accelerator.device]))
    inner.answer(0, 7, scale=3.0)
    collected = exchange.collect(8)
    while not collected:
        assert exchange.wait(10.0)
        collected = exchange.collect(8)
    (side,) = collected[0].sides
    assert side.device == accelerator.device
    assert torch.equal(side.cpu(), 3.0 * torch.eye(2))


def test_what_arrives_does_not_stand_behind_the_steps_that_a_snapshot_waits_for(pretended, inner):
    training = torch.cuda.current_stream(pretended.device)
    _, left = to_host(torch.ones(3, device=pretended.device))
    assert training in left.clock
    exchange = UploadingExchange(inner, [pretended.device])
    exchange.open(session(1, [pretended.device]))
    inner.answer(0, 7)
    assert exchange.collect(8) == []
    ((_, arrived),) = exchange._under_way
    assert training not in arrived.clock


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.uint8])
def test_neither_way_makes_the_host_wait(accelerator, dtype):
    with accelerator.no_waiting():
        there = upload([1, 2], dtype, accelerator.device)
        host, ready = to_host(there)
    assert ready is not None
    ready.synchronize()
    assert host.tolist() == [1, 2]
