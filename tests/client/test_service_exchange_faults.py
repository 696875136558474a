"""What a service may refuse or spoil, and how a broken stream is taken up again."""

from __future__ import annotations

import logging

import grpc
import numpy as np
import pytest

from exchange_session import collect, opened, session, snapshot
from fake_front import FakeFront, answer, roots, until, versions
from preconditioner_client.exchange import (
    Arrival,
    Rejection,
)
from preconditioner_protos import PackedBlock, chunk_messages, packed_length
from preconditioner_protos.v1 import preconditioner_pb2 as pb


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
    exchange = connect(front.address, close_timeout=30)
    spec = opened(exchange, session((3,), epoch=1))
    exchange.offer([snapshot(spec, 0, 50)], 50)
    collect(exchange, 1)
    spec = opened(exchange, session((4,), (2,), epoch=2))
    assert front.closed == ["s0"]
    assert front.streams[0].half_closed.is_set()
    exchange.offer([snapshot(spec, 0, 1)], 1)  # older than in the epoch before, and welcome
    (arrival,) = collect(exchange, 1)
    assert (arrival.step, arrival.sides[0].shape) == (1, (4, 4))
