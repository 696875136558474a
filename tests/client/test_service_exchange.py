from __future__ import annotations

import dataclasses
import gc
import logging
import os
import socket
import subprocess
import sys
import threading
import time
import weakref
from concurrent import futures

import grpc
import numpy as np
import pytest
import torch

from exchange_session import RIDGE, collect, opened, session, snapshot
from fake_front import FakeFront, answer, roots, until
from preconditioner_client.exchange import (
    Arrival,
    BlockSpec,
    Exchange,
    ExchangeError,
    Rejection,
    Snapshot,
)
from preconditioner_client.roots import inverse_root
from preconditioner_client.service_config import ServiceConfig
from preconditioner_client.service_exchange import ServiceExchange
from preconditioner_protos import PackedBlock, chunk_messages, packed_length
from preconditioner_protos.v1 import preconditioner_pb2 as pb


def versions(front: FakeFront) -> list[tuple[int, int]]:
    return [(s.block, s.step) for stream in front.streams for s in stream.snapshots]


# -- the way of the data -------------------------------------------------------------------------------


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


def test_a_copy_from_the_device_is_waited_for(front, connect):
    class Event:
        done = False
        asked = 0

        def query(self):
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
    for block in range(300):
        front.stream.push(PackedBlock(block, 1, (np.ones(3, "<f4"),)))
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


# -- what the service may refuse or spoil --------------------------------------------------------------


def test_nacks_become_rejections(front, connect):
    def refuse(stream, block):
        stream.nack(block.block, block.step, pb.NACK_REASON_NOT_FINITE, on_arrival=True, detail="NaN" * 500)

    front.on_snapshot = refuse
    exchange = connect(front.address)
    spec = opened(exchange, session())
    exchange.offer([snapshot(spec, 1, 4)], 4)
    (rejection,) = collect(exchange, 1)
    assert isinstance(rejection, Rejection)
    assert (rejection.block, rejection.step, rejection.reason) == (1, 4, "NOT_FINITE")
    assert len(rejection.detail) <= 500
    assert exchange.counters()["nacks"] == 1


@pytest.mark.parametrize("fault", ["checksum", "nan", "gap", "foreign side"])
def test_a_spoilt_preconditioner_is_dropped_and_its_credit_returned(front, connect, fault):
    def spoil(stream, block):
        stream.receipt(block)
        whole = roots(block, stream.manifest)
        if fault == "nan":
            whole.sides[0][2] = np.nan
        for chunks in chunk_messages([whole], message=pb.Chunks):
            if fault == "checksum":
                chunks.chunks[0].crc32 ^= 1
            elif fault == "gap":
                chunks.chunks[0].offset += 4
            elif fault == "foreign side":
                chunks.chunks[0].side = 77
            stream.send(chunks=chunks)

    front.on_snapshot = spoil
    exchange = connect(front.address)
    spec = opened(exchange, session())
    exchange.offer([snapshot(spec, 0, 1)], 1)
    (rejection,) = collect(exchange, 1)
    assert isinstance(rejection, Rejection)
    expected = {"checksum": "CHECKSUM", "nan": "NOT_FINITE"}.get(fault, "MALFORMED")
    assert (rejection.block, rejection.step, rejection.reason) == (0, 1, expected)
    assert exchange.counters()["dropped"] == 1
    until(lambda: front.stream.receipts == [(0, 1)])
    # The stream lives on.
    front.on_snapshot = answer
    exchange.offer([snapshot(spec, 0, 2)], 2)
    (arrival,) = collect(exchange, 1)
    assert isinstance(arrival, Arrival)
    assert exchange.counters()["connections"] == 1


def test_a_block_that_does_not_exist_harms_nothing(front, connect):
    exchange = connect(front.address)
    spec = opened(exchange, session((3,)))
    front.stream.push(PackedBlock(9, 1, (np.ones(6, "<f4"),)))
    front.stream.nack(9, 1, pb.NACK_REASON_ROOT_FAILED, on_arrival=False)
    exchange.offer([snapshot(spec, 0, 1)], 1)
    (arrival,) = collect(exchange, 1)
    assert (arrival.block, arrival.step) == (0, 1)


def test_duplicates_and_older_versions_are_dropped_and_counted(front, connect):
    exchange = connect(front.address)
    spec = opened(exchange, session((3,)))
    exchange.offer([snapshot(spec, 0, 5)], 5)
    (arrival,) = collect(exchange, 1)
    assert arrival.step == 5
    (sent,) = front.stream.snapshots
    for step in (5, 4):
        front.stream.push(roots(PackedBlock(0, step, sent.sides), front.stream.manifest))
    until(lambda: exchange.counters()["dropped"] == 2)
    assert exchange.collect(6) == []
    until(lambda: front.stream.receipts == [(0, 5), (0, 5), (0, 4)])


def test_only_the_latest_of_a_block_waits_to_be_collected(front, connect):
    exchange = connect(front.address)
    spec = opened(exchange, session((3,)))
    for step in (1, 2, 3):
        exchange.offer([snapshot(spec, 0, step)], step)
        until(lambda step=step: exchange.counters()["received"] == step)
    assert [item.step for item in exchange.collect(3)] == [3]
    assert exchange.counters()["dropped"] == 2


def test_with_several_in_flight_each_is_kept_in_order(front, connect):
    exchange = connect(front.address)
    spec = opened(exchange, session((3,), in_flight=3))
    exchange.offer([snapshot(spec, 0, step) for step in (1, 2, 3)], 3)
    until(lambda: exchange.counters()["received"] == 3)
    assert [item.step for item in exchange.collect(3)] == [1, 2, 3]


# -- breaks and returns --------------------------------------------------------------------------------


def test_a_broken_stream_is_taken_up_again_in_the_same_session(front, connect):
    exchange = connect(front.address)
    spec = opened(exchange, session())
    front.stream.end(grpc.StatusCode.UNAVAILABLE)
    until(lambda: exchange.generation == 2)
    assert len(front.opens) == 1
    exchange.offer([snapshot(spec, 0, 1)], 1)
    collect(exchange, 1)
    assert exchange.counters()["connections"] == 2


@pytest.mark.parametrize("code", ["CANCELLED", "INTERNAL", "DEADLINE_EXCEEDED", "UNKNOWN", "OK"])
def test_other_ends_of_a_stream_are_taken_up_again_too(front, connect, code):
    exchange = connect(front.address)
    opened(exchange, session())
    front.stream.end(grpc.StatusCode[code])
    until(lambda: exchange.generation == 2)


def test_a_lost_session_is_opened_again(front, connect):
    exchange = connect(front.address)
    spec = opened(exchange, session())
    front.forget_sessions()
    front.stream.end(grpc.StatusCode.UNAVAILABLE)
    until(lambda: exchange.generation == 2)
    assert len(front.opens) == 2
    exchange.offer([snapshot(spec, 0, 1)], 1)
    collect(exchange, 1)


def test_a_service_that_is_restarted_is_found_again(front, connect, caplog):
    exchange = connect(front.address)
    spec = opened(exchange, session())
    exchange.offer([snapshot(spec, 0, 1)], 1)
    collect(exchange, 1)
    with caplog.at_level(logging.WARNING, "preconditioner_client"):
        front.stop()
        until(lambda: exchange.counters()["connected"] == 0)
        exchange.offer([snapshot(spec, 0, 2)], 2)
        exchange.offer([snapshot(spec, 0, 3)], 3)
        assert exchange.counters()["snapshots_replaced"] == 1
        again = FakeFront(front.port)
        try:
            until(lambda: exchange.generation == 2)
            (arrival,) = collect(exchange, 1)  # the unsent one was kept
            assert arrival.step == 3
            assert len(again.opens) == 1
            exchange.close()
        finally:
            again.stop()
    assert len(caplog.records) == 1


def test_a_stream_that_ends_in_mid_chunk_leaves_nothing_behind(front, connect):
    def break_off(stream, block):
        stream.receipt(block)
        (chunks,) = chunk_messages([roots(block, stream.manifest)], message=pb.Chunks)
        chunk = chunks.chunks[0]
        chunk.payload = chunk.payload[:100]
        stream.send(chunks=pb.Chunks(chunks=[chunk]))
        stream.end(grpc.StatusCode.UNAVAILABLE)

    front.on_snapshot = break_off
    exchange = connect(front.address)
    spec = opened(exchange, session((20, 20)))
    exchange.offer([snapshot(spec, 0, 1)], 1)
    until(lambda: exchange.generation == 2)
    front.on_snapshot = answer
    exchange.offer([snapshot(spec, 0, 2)], 2)
    (arrival,) = collect(exchange, 1)
    assert isinstance(arrival, Arrival)
    assert arrival.step == 2


def test_after_drain_nothing_new_is_sent_but_results_are_taken(front, connect):
    exchange = connect(front.address)
    front.on_snapshot = lambda stream, block: stream.receipt(block)
    spec = opened(exchange, session())
    exchange.offer([snapshot(spec, 0, 1)], 1)
    until(lambda: len(versions(front)) == 1)
    stream = front.stream
    stream.send(drain=pb.Drain(grace_seconds=5))
    stream.push(roots(stream.snapshots[0], stream.manifest))
    (arrival,) = collect(exchange, 1)
    assert arrival.step == 1
    exchange.offer([snapshot(spec, 0, 2)], 2)
    until(lambda: stream.receipts == [(0, 1)])
    assert not exchange.wait(0.1)
    assert len(stream.snapshots) == 1
    stream.end(grpc.StatusCode.UNAVAILABLE)
    until(lambda: exchange.generation == 2)
    until(lambda: versions(front) == [(0, 1), (0, 2)])


def test_a_scheduled_trainer_offers_all_again_and_order_is_kept(front, connect):
    front.on_snapshot = lambda stream, block: None
    front.limits.credit_bytes = 4 * packed_length(3)
    exchange = connect(front.address)
    spec = opened(exchange, session((3,), in_flight=3))
    under_way = [snapshot(spec, 0, step) for step in (1, 2, 3)]
    exchange.offer(under_way, 3)
    until(lambda: versions(front) == [(0, 1)])
    front.on_snapshot = answer
    front.stream.end(grpc.StatusCode.UNAVAILABLE)
    until(lambda: exchange.counters()["connections"] == 2)
    # Offered before the new connection was noticed: it must not overtake those that are offered again.
    exchange.offer([snapshot(spec, 0, 4)], 4)
    assert exchange.generation == 2
    exchange.offer([*under_way[1:], snapshot(spec, 0, 4)], 5)
    assert [item.step for item in collect(exchange, 3)] == [2, 3, 4]


def test_what_was_acknowledged_is_not_sent_again_in_the_same_session(front, connect):
    front.on_snapshot = lambda stream, block: stream.receipt(block)
    exchange = connect(front.address)
    spec = opened(exchange, session((3,), (3,), in_flight=2))
    exchange.offer([snapshot(spec, 0, 1)], 1)
    until(lambda: front.streams and versions(front) == [(0, 1)])
    exchange.offer([snapshot(spec, 1, 1)], 1)
    until(lambda: len(versions(front)) == 2)
    # The receipt of this one is lost; asked again, the service says that it has it. That is no rejection.
    front.on_snapshot = lambda stream, block: None
    exchange.offer([snapshot(spec, 1, 2)], 2)
    until(lambda: len(versions(front)) == 3)
    front.stream.end(grpc.StatusCode.UNAVAILABLE)
    until(lambda: exchange.generation == 2)
    front.on_snapshot = lambda stream, block: stream.nack(
        block.block, block.step, pb.NACK_REASON_OUTDATED, on_arrival=True
    )
    exchange.offer([snapshot(spec, 0, 1), snapshot(spec, 1, 1), snapshot(spec, 1, 2)], 3)
    until(lambda: exchange.counters()["nacks"] == 1)
    assert versions(front)[3:] == [(1, 2)]
    assert exchange.collect(3) == []


def test_another_session_replaces_the_one_before(front, connect):
    exchange = connect(front.address)
    spec = opened(exchange, session((3,), epoch=1))
    exchange.offer([snapshot(spec, 0, 50)], 50)
    collect(exchange, 1)
    spec = opened(exchange, session((4,), (2,), epoch=2))
    assert front.closed == ["s0"]
    assert front.streams[0].half_closed.is_set()
    exchange.offer([snapshot(spec, 0, 1)], 1)  # older than in the epoch before, and welcome
    (arrival,) = collect(exchange, 1)
    assert (arrival.step, arrival.sides[0].shape) == (1, (4, 4))


# -- who may not ---------------------------------------------------------------------------------------


def test_a_superseded_trainer_never_comes_back(front, connect, caplog):
    exchange = connect(front.address)
    opened(exchange, session(job="twin"))
    with caplog.at_level(logging.ERROR, "preconditioner_client"):
        front.stream.end(grpc.StatusCode.ABORTED, "epoch 2 took over")
        until(lambda: caplog.records)
    assert "'twin' was taken over" in caplog.text
    assert not exchange.wait(0.5)
    assert (front.attaches, len(front.opens)) == (1, 1)
    exchange.collect(1)  # training goes on
    opened(exchange, session(job="twin", epoch=3))  # a later epoch may


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("ABORTED", "taken over"),
        ("PERMISSION_DENIED", "does not open job 'test'"),
        ("INVALID_ARGUMENT", "side 3 is odd"),
        ("RESOURCE_EXHAUSTED", "quota"),
        ("FAILED_PRECONDITION", "protocol version"),
        ("UNIMPLEMENTED", "no preconditioner service"),
    ],
)
def test_a_refusal_before_the_first_session_is_raised_once(front, connect, code, text):
    front.open_error = (grpc.StatusCode[code], "side 3 is odd")
    exchange = connect(front.address)
    exchange.open(session())
    assert exchange.wait(10)
    with pytest.raises(ExchangeError, match=text):
        exchange.collect(0)
    assert not exchange.wait(0.3)
    assert exchange.collect(1) == []


def test_a_later_refusal_is_logged_once_and_tried_again(front, connect, caplog, tmp_path):
    path = tmp_path / "token"
    path.write_text("first\n")
    front.token = "first"
    exchange = connect(front.address, token_file=str(path))
    opened(exchange, session())
    with caplog.at_level(logging.ERROR, "preconditioner_client"):
        front.token = "second"
        front.stream.end(grpc.StatusCode.UNAVAILABLE)
        until(lambda: caplog.records)
        assert not exchange.wait(0.4)  # several attempts
    assert len(caplog.records) == 1
    assert exchange.collect(1) == []
    path.write_text("second\n")
    until(lambda: exchange.generation == 2)
    assert "second" not in caplog.text


def test_a_placement_on_several_fronts_is_refused(front, connect):
    front.fronts = [pb.Front(address="127.0.0.1:1", blocks=[0]), pb.Front(blocks=[1])]
    exchange = connect(front.address)
    exchange.open(session())
    assert exchange.wait(10)
    with pytest.raises(ExchangeError, match="2 fronts"):
        exchange.collect(0)


def test_the_front_of_the_placement_is_dialled(front, connect):
    other = FakeFront()
    try:
        request_of = other._sessions
        front.fronts = [pb.Front(address=other.address)]
        other._sessions = front._sessions
        exchange = connect(front.address)
        opened(exchange, session())
        assert (front.attaches, other.attaches) == (0, 1)
        exchange.close()
        assert front.closed == ["s0"]
        other._sessions = request_of
    finally:
        other.stop()


def test_a_front_off_loopback_is_not_dialled_in_the_clear(front, connect):
    front.fronts = [pb.Front(address="192.0.2.1:50051")]
    exchange = connect(front.address)
    exchange.open(session())
    assert exchange.wait(10)
    with pytest.raises(ExchangeError, match="not on loopback"):
        exchange.collect(0)


# -- the first look ------------------------------------------------------------------------------------


def test_a_wrong_token_is_told_at_construction(front, connect):
    front.token = "right-token"
    with pytest.raises(ExchangeError, match=r"refuses the token.*PRECONDITIONER_TOKEN") as caught:
        connect(front.address, token="wrong-token")
    assert "wrong-token" not in str(caught.value)
    with pytest.raises(ExchangeError, match="refuses the token"):
        connect(front.address)
    opened(connect(front.address, token="right-token"), session())


def test_another_protocol_version_is_told_at_construction(front, connect):
    front.protocol_version = 2
    with pytest.raises(ExchangeError, match="speaks protocol versions 2 to 2, this client 1"):
        connect(front.address)


def test_something_else_at_the_address_is_told_at_construction(connect):
    server = grpc.server(futures.ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with pytest.raises(ExchangeError, match="no preconditioner service"):
            connect(f"127.0.0.1:{port}")
    finally:
        server.stop(None)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_an_unreachable_service_is_warned_of_once_and_found_later(connect, caplog):
    port = free_port()
    with caplog.at_level(logging.WARNING, "preconditioner_client"):
        exchange = connect(f"127.0.0.1:{port}")
        spec = session()
        exchange.open(spec)
        exchange.offer([snapshot(spec, 0, 1)], 1)
        assert not exchange.wait(0.5)
    assert len(caplog.records) == 1
    assert f"127.0.0.1:{port}" in caplog.text
    front = FakeFront(port)
    try:
        collect(exchange, 1)
        exchange.close()
    finally:
        front.stop()


def test_a_proxy_is_not_asked_for_loopback(front, connect, monkeypatch):
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    opened(connect(front.address), session())


def test_tls_on_one_side_only_is_told_at_construction(connect, certificates):
    credentials = grpc.ssl_server_credentials([(certificates.key, certificates.chain)])
    secure, plain = FakeFront(credentials=credentials), FakeFront()
    try:
        with pytest.raises(ExchangeError, match="speaks TLS: set tls=True"):
            connect(secure.address)
        with pytest.raises(ExchangeError, match="no TLS connection"):
            connect(plain.address, tls=True)
        with pytest.raises(ExchangeError, match="no TLS connection"):
            connect(secure.address, tls=True)  # an authority that nobody knows
        exchange = connect(f"localhost:{secure.port}", tls_ca=certificates.path)
        opened(exchange, session())
        exchange.close()
    finally:
        secure.stop()
        plain.stop()


# -- never in the way ----------------------------------------------------------------------------------


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
    exchange = connect(front.address)
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
from preconditioner_client.service_exchange import ServiceExchange

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
    trainer = subprocess.run(
        [sys.executable, "-c", FORKING, front.address],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert trainer.returncode == 0, trainer.stderr
    assert trainer.stdout.split() == ["0", "1"]
    assert len(front.opens) == len(front.closed) == 1


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
