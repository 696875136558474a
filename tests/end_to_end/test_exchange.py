"""The exchange with the real service: a subprocess, gRPC, Ray and its actors."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from exchange_session import RIDGE, collect, opened, session, snapshot
from fake_front import until
from preconditioner_client.config import Ridge
from preconditioner_client.exchange import Arrival, BlockSpec, Rejection, SessionSpec, Snapshot
from preconditioner_client.roots import inverse_root
from preconditioner_client.service_config import ServiceConfig
from preconditioner_client.service_exchange import ServiceExchange
from preconditioner_protos import unpacking_indices
from processes import command_line, family, gone, kill

START_SECONDS = 120.0


def services(parent: psutil.Process | None = None) -> list[psutil.Process]:
    """The embedded services that a process started."""
    found = []
    for child in (parent or psutil.Process()).children():
        try:
            command = child.cmdline()
        except psutil.Error:
            continue
        # Those that other tests start by themselves have a fixed port.
        if "preconditioner_service" in command and ("--port", "0") in itertools.pairwise(command):
            found.append(child)
    return found


def connected(exchange: ServiceExchange, spec: SessionSpec) -> SessionSpec:
    before = exchange.generation
    exchange.open(spec)
    until(lambda: exchange.generation > before, START_SECONDS, "the service to start")
    return spec


@pytest.fixture(scope="module")
def exchange():
    exchange = ServiceExchange(ServiceConfig(workers=1))
    connected(exchange, session((6, 9), (40,), job="shared", epoch=1))
    yield exchange
    (service,) = services()
    processes = family(service.pid)
    exchange.close()
    until(lambda: gone(processes), 20, "the service and its Ray to end")


epochs = iter(range(2, 1000))


def test_roots_are_those_of_the_statistics(exchange):
    spec = opened(exchange, session((6, 9), (40,), (300, 2), job="shared", epoch=next(epochs)))
    sources = [snapshot(spec, block, 1) for block in range(3)]
    exchange.offer(sources, 1)
    for arrival in collect(exchange, 3, 60):
        assert isinstance(arrival, Arrival)
        block = spec.blocks[arrival.block]
        packed = sources[arrival.block].sides
        for side, values, n, p in zip(arrival.sides, packed, block.sides, block.root_orders, strict=True):
            full = values[torch.from_numpy(unpacking_indices(n).copy())].view(n, n)
            assert torch.equal(side, side.T)
            expected = inverse_root(full, p, RIDGE)
            assert torch.linalg.norm(side - expected) < 1e-4 * torch.linalg.norm(expected)


def test_bad_statistics_are_refused_and_good_ones_follow(exchange):
    spec = opened(exchange, session((3,), job="shared", epoch=next(epochs)))
    exchange.offer([Snapshot(0, 1, (torch.full((6,), float("nan")),))], 1)
    (rejection,) = collect(exchange, 1, 60)
    assert isinstance(rejection, Rejection)
    assert rejection.reason == "NOT_FINITE"
    exchange.offer([snapshot(spec, 0, 2)], 2)
    (arrival,) = collect(exchange, 1, 60)
    assert isinstance(arrival, Arrival)


def test_each_of_several_in_flight_comes_back_in_order(exchange):
    spec = opened(exchange, session(*[(60, 60)] * 4, job="shared", epoch=next(epochs), in_flight=4))
    for step in (1, 2, 3, 4):
        exchange.offer([snapshot(spec, block, step) for block in range(4)], step)
    arrivals = collect(exchange, 16, 60)
    for block in range(4):
        assert [a.step for a in arrivals if a.block == block] == [1, 2, 3, 4]


def test_two_exchanges_share_one_service(exchange):
    other = ServiceExchange(ServiceConfig(workers=1))
    try:
        spec = connected(other, session((5,), job="other"))
        other.offer([snapshot(spec, 0, 1)], 1)
        collect(other, 1, 60)
        assert len(services()) == 1
    finally:
        other.close()
    assert len(services()) == 1


def test_a_frozen_service_never_blocks_the_trainer(exchange, capsys):
    spec = opened(exchange, session(*[(256, 256)] * 8, job="shared", epoch=next(epochs)))
    sources = [snapshot(spec, block, 0) for block in range(8)]
    step = 0

    def run(seconds: float) -> float:
        nonlocal step
        longest, end = 0.0, time.monotonic() + seconds
        while time.monotonic() < end:
            step += 1
            began = time.perf_counter()
            exchange.offer([Snapshot(b, step, sources[b].sides) for b in range(8)], step)
            exchange.collect(step)
            longest = max(longest, time.perf_counter() - began)
            time.sleep(0.002)
        return longest

    before = run(1.0)
    (service,) = services()
    generation, received = exchange.generation, exchange.counters()["received"]
    service.send_signal(signal.SIGSTOP)
    try:
        frozen = run(3.0)
    finally:
        service.send_signal(signal.SIGCONT)
    with capsys.disabled():
        print(f"\nlongest offer + collect: {before * 1e3:.2f} ms before, {frozen * 1e3:.2f} ms while frozen")
    assert frozen < max(0.25, 1.5 * before)  # other processes have their share of the machine
    until(lambda: run(0.02) and exchange.counters()["received"] > received + 16)
    assert exchange.generation == generation  # a pause this short does not even break the stream


def test_after_a_kill_versions_arrive_again(exchange, caplog):
    spec = opened(exchange, session((30, 30), job="shared", epoch=next(epochs)))
    exchange.offer([snapshot(spec, 0, 1)], 1)
    collect(exchange, 1, 60)
    (service,) = services()
    processes = family(service.pid)
    generation = exchange.generation
    service.kill()
    until(lambda: not exchange.counters()["connected"])
    exchange.offer([snapshot(spec, 0, 2)], 2)
    until(lambda: exchange.generation > generation, START_SECONDS, "the service to be started again")
    exchange.offer([snapshot(spec, 0, 3)], 3)
    (arrival,) = collect(exchange, 1, 60)
    assert isinstance(arrival, Arrival)
    until(lambda: gone(processes), 20, "the Ray of the killed service to end")
    (again,) = services()
    assert again.pid != service.pid


TRAINER = """
import os, time, torch
from preconditioner_client.config import Ridge
from preconditioner_client.exchange import BlockSpec, SessionSpec, Snapshot
from preconditioner_client.service_config import ServiceConfig
from preconditioner_client.service_exchange import ServiceExchange

exchange = ServiceExchange(ServiceConfig(workers=1))
exchange.open(SessionSpec("trainer", 1, (BlockSpec("a", (3,), (2.0,), Ridge()),)))
while exchange.generation == 0:
    exchange.collect(0)
    exchange.wait(1)
exchange.offer([Snapshot(0, 1, (torch.tensor([1.0, 0, 0, 2.0, 0, 3.0]),))], 1)
while not exchange.collect(1):
    exchange.wait(1)
# As a DataLoader's worker: forked after connecting, and it outlives a trainer that is killed.
child = os.fork()
if child == 0:
    time.sleep(1000)
print(child, flush=True)
time.sleep(1000)
"""


def test_the_service_ends_with_a_trainer_that_is_killed():
    with subprocess.Popen([sys.executable, "-c", TRAINER], stdout=subprocess.PIPE, text=True) as trainer:
        line = trainer.stdout.readline()
        assert line, "the trainer failed"
        child = psutil.Process(int(line))
        try:
            (service,) = services(psutil.Process(trainer.pid))
            processes = family(service.pid)
            assert len(processes) > 3  # Ray's are among them
            trainer.kill()
            until(lambda: gone(processes), 20, "the service and its Ray to end")
        finally:
            kill([child])
            trainer.kill()


def test_an_embedded_service_that_cannot_start_says_why(monkeypatch):
    monkeypatch.setenv("PRECONDITIONER_SERVICE_OBJECT_STORE_BYTES", "1")
    exchange = ServiceExchange(ServiceConfig(workers=2))
    try:
        exchange.open(SessionSpec("bad", 1, (BlockSpec("a", (3,), (2.0,), Ridge()),)))
        assert exchange.wait(START_SECONDS)
        with pytest.raises(RuntimeError, match=r"could not be started.*object.store.bytes"):
            exchange.collect(0)
    finally:
        exchange.close()
    assert not [s for s in services() if "2" in command_line(s).split()]


def test_an_explicit_address_with_the_wrong_token(exchange):
    from preconditioner_client.endpoint import EmbeddedEndpoint
    from preconditioner_client.exchange import ExchangeError

    endpoint = EmbeddedEndpoint(ServiceConfig(workers=1))
    try:
        address, token = endpoint.locate(START_SECONDS)
        with pytest.raises(ExchangeError, match="refuses the token"):
            ServiceExchange(ServiceConfig(address=address, token="wrong"))
        direct = ServiceExchange(ServiceConfig(address=address, token=token))
        spec = opened(direct, session((4,), job="direct"))
        direct.offer([snapshot(spec, 0, 1)], 1)
        collect(direct, 1, 60)
        direct.close()
    finally:
        endpoint.release()
    assert os.getpid() == exchange._owner
