"""Never in the way: slow services, ends, forks, and the cost of a step."""

from __future__ import annotations

import dataclasses
import gc
import os
import socket
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import pytest

from exchange_session import collect, opened, session, snapshot
from fake_front import until
from preconditioner_client.exchange import (
    Snapshot,
)
from preconditioner_client.service_config import ServiceConfig
from preconditioner_client.service_exchange import ServiceExchange
from preconditioner_protos import packed_length


def run_trainer(script, address):
    """Run it in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", script, address],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_service_that_does_not_read_blocks_nothing(front, connect):
    exchange = connect(front.address, close_timeout=0.5)
    spec = opened(exchange, session(*[(500, 500)] * 8))
    front.reading.clear()
    longest = 0.0
    for step in range(1, 60):
        snapshots = [snapshot(spec, step % 8, step)]
        began = time.perf_counter()
        exchange.offer(snapshots, step)
        exchange.collect(step)
        longest = max(longest, time.perf_counter() - began)
    assert longest < 0.2
    assert exchange.counters()["snapshots_replaced"] > 0
    began = time.monotonic()
    exchange.close()
    assert time.monotonic() - began < 5


def test_attached_that_never_comes_is_given_up_and_tried_again(front, connect):
    front.mute = True
    exchange = connect(front.address, connect_timeout=0.3)
    exchange.open(session())
    until(lambda: front.attaches >= 2)
    front.mute = False
    until(lambda: exchange.generation == 1)


def test_closing_ends_session_and_threads(front, connect):
    before = set(threading.enumerate())
    exchange = connect(front.address, close_timeout=30)
    opened(exchange, session())
    exchange.close()
    exchange.close()
    assert front.closed == ["s0"]
    assert front.stream.half_closed.is_set()
    until(lambda: not [t for t in set(threading.enumerate()) - before if "preconditioner" in t.name])
    assert exchange.collect(1) == []
    assert not exchange.wait(5)
    with pytest.raises(RuntimeError, match="closed"):
        exchange.open(session())


def test_closing_while_connecting_does_not_hang(connect):
    with socket.socket() as silent:  # takes connections and says nothing
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        exchange = connect(f"127.0.0.1:{silent.getsockname()[1]}", connect_timeout=0.2)
        exchange._config = dataclasses.replace(exchange._config, connect_timeout=60)
        exchange.open(session())
        until(lambda: exchange._background.supervisor._active is not None)
        began = time.monotonic()
        exchange.close()
        assert time.monotonic() - began < 2


def test_an_exchange_that_nobody_holds_ends(front):
    exchange = ServiceExchange(ServiceConfig(address=front.address))
    opened(exchange, session())
    gone = weakref.ref(exchange)
    exchange.myself = exchange  # a cycle, as an optimizer with hooks is
    del exchange
    gc.collect()
    assert gone() is None
    until(lambda: front.closed == ["s0"])


COLLECTED = """
import atexit, gc, sys, threading

@atexit.register  # before the client's own, so called after it
def tell():
    print(sorted(thread.name for thread in threading.enumerate() if "preconditioner" in thread.name))

from exchange_session import opened, session
from preconditioner_client.service_config import ServiceConfig
from preconditioner_client import supervisor
from preconditioner_client.service_exchange import ServiceExchange

supervisor._CLOSE_SESSION_SECONDS = 30.0
exchange = ServiceExchange(ServiceConfig(address=sys.argv[1]))
opened(exchange, session())
del exchange
gc.collect()
"""


def test_the_interpreter_s_exit_waits_for_a_collected_exchange(front):
    """A thread that finalization stops within gRPC's C++ aborts the whole process."""
    trainer = run_trainer(COLLECTED, front.address)
    assert trainer.returncode == 0, trainer.stderr
    assert trainer.stdout.split() == ["[]"]
    assert front.closed == ["s0"]


def test_a_forked_child_does_no_harm(front, connect):
    exchange = connect(front.address)
    spec = opened(exchange, session())
    exchange._mailbox._lock.acquire()  # as another thread may hold it when the fork happens
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            exchange.offer([snapshot(spec, 0, 1)], 1)
            assert exchange.collect(1) == []
            assert not exchange.wait(5)
            assert exchange.counters()["connected"] == 0
            exchange.open(session(epoch=9))
            exchange.close()
            channel = exchange._background
            del exchange, channel
            gc.collect()
            status = 0
        finally:
            os._exit(status)
    exchange._mailbox._lock.release()
    deadline = time.monotonic() + 20
    while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
        assert time.monotonic() < deadline, "the child hangs"
        time.sleep(0.01)
    assert os.waitstatus_to_exitcode(ended[1]) == 0
    exchange.offer([snapshot(spec, 0, 2)], 2)
    (arrival,) = collect(exchange, 1)
    assert arrival.step == 2
    assert (exchange.generation, front.closed) == (1, [])


FORKING = """
import os, sys
from exchange_session import collect, opened, session, snapshot
from preconditioner_client.service_config import ServiceConfig
from preconditioner_client import supervisor
from preconditioner_client.service_exchange import ServiceExchange

supervisor._CLOSE_SESSION_SECONDS = 30.0
exchange = ServiceExchange(ServiceConfig(address=sys.argv[1]))
spec = opened(exchange, session())
child = os.fork()
if child == 0:
    exchange.collect(1)
    sys.exit(0)  # with all of the interpreter's finalization
_, status = os.waitpid(child, 0)
exchange.offer([snapshot(spec, 0, 1)], 1)
collect(exchange, 1)
print(status, exchange.generation)
"""


def test_a_forked_child_that_ends_in_order_leaves_the_parent_s_stream_alone(front):
    trainer = run_trainer(FORKING, front.address)
    assert trainer.returncode == 0, trainer.stderr
    assert trainer.stdout.split() == ["0", "1"]
    assert len(front.opens) == len(front.closed) == 1


BUSY = """
import os, sys
from collections import Counter
import preconditioner_client  # before gRPC, as in a training script
from exchange_session import opened, session, snapshot
from preconditioner_client.service_config import ServiceConfig
from preconditioner_client.service_exchange import ServiceExchange

exchanges = [ServiceExchange(ServiceConfig(address=sys.argv[1])) for _ in range(4)]
specs = [opened(e, session(job=f"job{i}")) for i, e in enumerate(exchanges)]
ended = Counter()
for step in range(1, 151):
    for exchange, spec in zip(exchanges, specs):
        exchange.offer([snapshot(spec, 0, step)], step)
        exchange.collect(step)
    child = os.fork()
    if child == 0:
        os._exit(0)
    ended[os.waitpid(child, 0)[1]] += 1
for exchange in exchanges:
    exchange.close()
print(dict(ended))
"""


def test_children_that_are_forked_while_matrices_flow_live(front, monkeypatch):
    """As the workers of a DataLoader are; gRPC's own handlers of forks would abort some of them."""
    monkeypatch.delenv("GRPC_ENABLE_FORK_SUPPORT", raising=False)
    trainer = run_trainer(BUSY, front.address)
    assert trainer.returncode == 0, trainer.stderr
    assert trainer.stdout.strip() == "{0: 150}", trainer.stderr


def test_cost_of_a_step_while_matrices_flow(front, connect, capsys):
    """Not a bound, which a shared machine would not keep: the figures are for people."""
    exchange = connect(front.address)
    front.on_snapshot = lambda stream, block: (stream.receipt(block), stream.push(block))
    spec = opened(exchange, session(*[(512, 512)] * 16))
    block_bytes = 2 * 4 * packed_length(512)
    sources = [snapshot(spec, block, 0) for block in range(16)]
    costs, step = [], 0
    began = time.monotonic()
    while (elapsed := time.monotonic() - began) < 2.0:
        step += 1
        due = exchange.counters()["bytes_sent"] < 20e6 * elapsed
        snapshots = [Snapshot(step % 16, step, sources[step % 16].sides)] if due else []
        start = time.perf_counter()
        exchange.offer(snapshots, step)
        exchange.collect(step)
        costs.append(time.perf_counter() - start)
        time.sleep(0.002)
    counters = exchange.counters()
    rate = counters["bytes_received"] / elapsed / 1e6
    micro = np.array(costs) * 1e6
    with capsys.disabled():
        print(
            f"\noffer + collect per step at {rate:.1f} MB/s each way ({counters['received']} blocks of "
            f"{block_bytes / 1e6:.2f} MB): median {np.median(micro):.1f} us, "
            f"99th percentile {np.percentile(micro, 99):.1f} us, longest {micro.max():.0f} us"
        )
    assert counters["received"] > 0


@pytest.mark.parametrize("answered", [False, True])
def test_a_training_that_no_preconditioner_reached_says_so_at_its_end(front, connect, caplog, answered):
    if answered:
        front.on_snapshot = lambda stream, block: (stream.receipt(block), stream.push(block))
    exchange = connect(front.address)
    spec = opened(exchange, session())
    exchange.offer([snapshot(spec, 0, 1)], 1)
    if answered:
        collect(exchange, 1)
    exchange.close()
    assert (
        "had sent a preconditioner that was used: blocks had no preconditioner" in caplog.text
    ) != answered


UNREACHED = """
import sys, torch
from preconditioner_client import Shampoo

def train():
    parameter = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = Shampoo([parameter], service=sys.argv[1])
    parameter.grad = torch.ones(3, 2)
    optimizer.step()

train()
"""


def test_so_does_one_whose_service_was_never_there():
    trainer = run_trainer(UNREACHED, "127.0.0.1:1")
    assert trainer.returncode == 0, trainer.stderr
    assert "ended before the preconditioner service was ready or could be reached" in trainer.stderr
    assert "preconditioner-service serve" in trainer.stderr
