"""What travels between a trainer and its service, and under which credit."""

from __future__ import annotations

import contextlib
import dataclasses

import numpy as np
import pytest
import torch

from exchange_session import RIDGE, collect, opened, session, snapshot
from fake_front import until, versions
from preconditioner_client.exchange import (
    Arrival,
    BlockSpec,
    Exchange,
)
from preconditioner_client.roots import inverse_root
from preconditioner_protos import PackedBlock, packed_length
from preconditioner_protos.v1 import preconditioner_pb2 as pb


def test_it_is_an_exchange(front, connect):
    assert isinstance(connect(front.address), Exchange)


def test_roots_come_back_whole_and_symmetric(front, connect):
    exchange = connect(front.address)
    spec = opened(exchange, session((3, 5), (4,), (700, 600)))
    offered = [snapshot(spec, block, 7) for block in range(3)]
    exchange.offer(offered, 7)
    arrivals = {item.block: item for item in collect(exchange, 3)}
    for block, source in enumerate(offered):
        arrival = arrivals[block]
        assert isinstance(arrival, Arrival)
        assert arrival.step == 7
        for side, packed, n, p in zip(
            arrival.sides,
            source.sides,
            spec.blocks[block].sides,
            spec.blocks[block].root_orders,
            strict=True,
        ):
            assert side.shape == (n, n)
            assert side.dtype is torch.float32
            assert torch.equal(side, side.T)
            full = torch.zeros(n, n)
            full[tuple(torch.triu_indices(n, n))] = packed
            full = full + full.triu(1).T
            assert torch.allclose(side, inverse_root(full, p, RIDGE), rtol=1e-4, atol=1e-5)
    counters = exchange.counters()
    total = sum(packed_length(n) * 4 for block in spec.blocks for n in block.sides)
    assert counters["bytes_sent"] == counters["bytes_received"] == total
    assert counters["snapshots_sent"] == counters["received"] == 3
    assert (counters["connections"], counters["connected"], counters["dropped"]) == (1, 1, 0)
    until(lambda: sorted(front.stream.receipts) == [(0, 7), (1, 7), (2, 7)], what="receipts for the service")


def test_the_session_is_announced_as_the_protocol_has_it(front, connect):
    exchange = connect(front.address, credit_bytes=123456)
    opened(exchange, session((3, 5), epoch=9, in_flight=3, job="job-1"))
    (request,) = front.opens
    assert (request.protocol_version, request.job, request.rank, request.world_size) == (1, "job-1", 0, 1)
    assert (request.epoch, request.max_staleness) == (9, 50)
    assert request.client.startswith("preconditioner_client")
    manifest = request.manifest
    assert manifest.statistics_dtype == manifest.preconditioner_dtype == pb.DTYPE_FLOAT32
    assert manifest.snapshots_in_flight == 3
    assert [side.length for side in manifest.blocks[0].sides] == [3, 5]
    assert [side.root_order for side in manifest.blocks[0].sides] == [4.0, 4.0]
    assert manifest.blocks[0].ridge == pb.Ridge(kind=pb.RIDGE_KIND_ABSOLUTE, value=0.1)
    assert (front.stream.attach.epoch, front.stream.attach.credit_bytes) == (9, 123456)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"job": "two words"}, "job 'two words' is not"),
        ({"rank": 2}, "rank 2 and world_size 1"),
        ({"epoch": -1}, "-1"),
        ({"blocks": (BlockSpec("a", (0,), (2.0,), RIDGE),)}, r"blocks\[0\].sides\[0\].length must be >= 1"),
    ],
)
def test_a_session_that_cannot_be_right_is_told_at_once(front, connect, settings, message):
    exchange = connect(front.address)
    with pytest.raises(ValueError, match=message):
        exchange.open(dataclasses.replace(session(), **settings))
    opened(exchange, session())


def test_messages_keep_to_the_limit_of_the_service(front, connect):
    front.limits.max_message_bytes = 64 * 1024
    exchange = connect(front.address)
    spec = opened(exchange, session((300, 300)))
    exchange.offer([snapshot(spec, 0, 1)], 1)
    collect(exchange, 1)
    assert 32 * 1024 < front.stream.largest_message <= 64 * 1024


def test_a_copy_from_the_device_is_waited_for(front, connect, monkeypatch):
    current = []

    @contextlib.contextmanager
    def on(device):
        current.append(device)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", on)

    class Event:
        device = torch.device("cuda", 3)
        done = False
        asked = 0

        def query(self):
            # Another device would get a context of this process.
            assert current == [self.device]
            self.asked += 1
            return self.done

    exchange, event = connect(front.address), Event()
    spec = opened(exchange, session())
    exchange.offer([snapshot(spec, 0, 1, event)], 1)
    until(lambda: event.asked > 3)
    assert not versions(front)
    event.done = True
    collect(exchange, 1)


def test_snapshots_offered_before_there_is_a_stream_are_sent_later(front, connect):
    exchange = connect(front.address)
    spec = session()
    exchange.open(spec)
    exchange.offer([snapshot(spec, 0, 1)], 1)
    (arrival,) = collect(exchange, 1)
    assert (arrival.block, arrival.step) == (0, 1)


def test_credit_of_the_service_is_respected(front, connect):
    front.on_snapshot = lambda stream, block: None
    front.limits.credit_bytes = 2 * 4 * packed_length(8)
    exchange = connect(front.address)
    spec = opened(exchange, session(*[(8,)] * 5))
    exchange.offer([snapshot(spec, block, 1) for block in range(5)], 1)
    until(lambda: len(versions(front)) == 2)
    assert not exchange.wait(0.2)
    assert versions(front) == [(0, 1), (1, 1)]
    # What waits is still replaced by newer ones, in the place of the older.
    exchange.offer([snapshot(spec, 3, 2)], 2)
    front.stream.receipt(front.stream.snapshots[0])
    until(lambda: len(versions(front)) == 3)
    front.stream.nack(1, 1, pb.NACK_REASON_NOT_FINITE, on_arrival=True)
    until(lambda: len(versions(front)) == 4)
    assert versions(front) == [(0, 1), (1, 1), (2, 1), (3, 2)]
    assert exchange.counters()["snapshots_replaced"] == 1


def test_one_block_larger_than_the_credit_is_sent_all_the_same(front, connect):
    front.limits.credit_bytes = 10
    exchange = connect(front.address)
    spec = opened(exchange, session((30,), (30,)))
    exchange.offer([snapshot(spec, block, 1) for block in range(2)], 1)
    collect(exchange, 2)


def test_receipts_share_messages(front, connect):
    exchange = connect(front.address)
    opened(exchange, session(*[(2,)] * 300))
    front.stream.push(*(PackedBlock(block, 1, (np.ones(3, "<f4"),)) for block in range(300)))
    until(lambda: len(front.stream.receipts) == 300)
    assert sorted(front.stream.receipts) == [(block, 1) for block in range(300)]
    assert front.stream.receipt_messages < 100


def test_receipts_do_not_wait_when_the_service_needs_its_credit(front, connect):
    exchange = connect(front.address, credit_bytes=40)
    opened(exchange, session((3,), (3,)))
    for step in range(1, 51):  # as a service with credit for one block would: the next after the receipt
        front.stream.push(PackedBlock(step % 2, step, (np.ones(6, "<f4"),)))
        until(lambda step=step: len(front.stream.receipts) == step)
    assert exchange.counters()["received"] == 50
