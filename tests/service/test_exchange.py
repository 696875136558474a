"""Snapshots up, preconditioners down: one stream of a real service, on real Ray."""

from __future__ import annotations

import asyncio

import grpc
import numpy as np
import psutil
import pytest

from preconditioner_protos import PackedBlock, chunk_messages, pack
from preconditioner_protos.v1 import preconditioner_pb2 as pb
from preconditioner_service import exchange
from preconditioner_service.board import Board
from preconditioner_service.dispatcher import Dispatcher
from raw_trainer import expected_root, manifest, open_request, statistics, wait_for


@pytest.mark.parametrize("dtype", [pb.DTYPE_FLOAT32, pb.DTYPE_FLOAT64])
@pytest.mark.parametrize("order", [2.0, 4.0])
def test_roots_agree_with_numpy(trainer, job, dtype, order):
    kind = np.float32 if dtype == pb.DTYPE_FLOAT32 else np.float64
    shapes = [(7,), (64, 32), (130, 1), (300, 64, 5)]
    trainer.open(open_request(job, manifest(*shapes, order=order, dtype=dtype)))
    stream = trainer.attach()
    matrices = {
        (block, side): statistics(n, seed=10 * block + side, dtype=kind)
        for block, sides in enumerate(shapes)
        for side, n in enumerate(sides)
    }
    for block, sides in enumerate(shapes):
        stream.snapshot(block, 3, *(matrices[block, side] for side in range(len(sides))))
    stream.until(lambda: len(stream.arrived) == len(shapes))
    assert sorted(stream.receipts) == [(block, 3) for block in range(len(shapes))]
    for (block, side), matrix in matrices.items():
        root = stream.root(block, 3, side)
        expected = expected_root(matrix, order)
        assert root.dtype == kind
        bound = 1e-6 if kind is np.float32 else 1e-9
        np.testing.assert_allclose(root, expected, rtol=0, atol=bound * np.abs(expected).max())
    stream.half_close()
    stream.until(lambda: stream.ended)
    assert stream.code is grpc.StatusCode.OK


def test_large_blocks_travel_in_several_messages_within_the_limit(trainer, job):
    opened = trainer.open(open_request(job, manifest((1500, 1500))))
    stream = trainer.attach()
    stream.snapshot(0, 1, np.eye(1500, dtype=np.float32), 16 * np.eye(1500, dtype=np.float32))
    stream.until(lambda: stream.arrived)
    np.testing.assert_allclose(stream.root(0, 1, 0), np.eye(1500), atol=1e-5)
    np.testing.assert_allclose(stream.root(0, 1, 1), 0.5 * np.eye(1500), atol=1e-5)
    assert opened.limits.max_message_bytes == 4 * 1024 * 1024  # the channel refuses larger ones by default


def test_one_bad_matrix_is_a_nack_and_the_stream_lives_on(trainer, job):
    trainer.open(open_request(job, manifest((8,), (8,), (8,), (8,), (8,))))
    stream = trainer.attach()
    good, nan = statistics(8), statistics(8)
    nan[2, 3] = np.nan
    infinite = statistics(8)
    infinite[0, 0] = np.inf
    stream.snapshot(0, 1, nan)
    stream.snapshot(1, 1, infinite)
    stream.snapshot(2, 1, np.diag([1, 1, 1, 1, 1, 1, 1, -1]).astype(np.float32))
    (corrupt,) = chunk_messages([PackedBlock(3, 1, (pack(good),))], message=pb.Chunks)
    corrupt.chunks[0].crc32 ^= 1
    stream.put(chunks=corrupt)
    (beyond,) = chunk_messages([PackedBlock(0, 2, (pack(good),))], message=pb.Chunks)
    beyond.chunks[0].block = 77
    stream.put(chunks=beyond)
    stream.snapshot(4, 1, good)
    stream.until(lambda: len(stream.nacks) == 5 and stream.arrived)
    answers = {(nack.block, nack.step): (nack.reason, nack.on_arrival) for nack in stream.nacks}
    assert answers == {
        (0, 1): (pb.NACK_REASON_NOT_FINITE, False),
        (1, 1): (pb.NACK_REASON_NOT_FINITE, False),
        (2, 1): (pb.NACK_REASON_INDEFINITE, False),
        (3, 1): (pb.NACK_REASON_CHECKSUM, True),
        (77, 2): (pb.NACK_REASON_MALFORMED, True),
    }
    assert all(nack.detail for nack in stream.nacks)
    # Every snapshot has one answer of its arrival.
    assert sorted(stream.receipts) == [(0, 1), (1, 1), (2, 1), (4, 1)]
    assert stream.versions() == [(4, 1)]
    stream.snapshot(0, 2, good)
    stream.until(lambda: (0, 2) in stream.versions())


def test_an_order_that_no_root_has_is_a_nack(trainer, job):
    trainer.open(open_request(job, manifest((4,), order=3.14159265)))
    stream = trainer.attach()
    stream.snapshot(0, 1, statistics(4))
    stream.until(lambda: stream.nacks)
    assert stream.nacks[0].reason == pb.NACK_REASON_ROOT_FAILED


def test_steps_that_do_not_grow_are_outdated(trainer, job):
    trainer.open(open_request(job, manifest((4,))))
    stream = trainer.attach()
    stream.snapshot(0, 5, statistics(4))
    stream.snapshot(0, 5, statistics(4))
    stream.snapshot(0, 4, statistics(4))
    stream.until(lambda: len(stream.nacks) == 2)
    assert [(nack.step, nack.reason, nack.on_arrival) for nack in stream.nacks] == [
        (5, pb.NACK_REASON_OUTDATED, True),
        (4, pb.NACK_REASON_OUTDATED, True),
    ]
    assert stream.receipts == [(0, 5)]


def test_an_unfinished_block_is_malformed_and_the_next_one_whole(trainer, job):
    trainer.open(open_request(job, manifest((64,), (8,))))
    stream = trainer.attach()
    (chunks,) = chunk_messages([PackedBlock(0, 1, (pack(statistics(64)),))], message=pb.Chunks)
    chunks.chunks[0].payload = chunks.chunks[0].payload[:100]
    stream.put(chunks=chunks)
    stream.snapshot(1, 1, statistics(8))
    stream.until(lambda: stream.nacks and stream.arrived)
    assert (stream.nacks[0].block, stream.nacks[0].reason) == (0, pb.NACK_REASON_MALFORMED)


def test_latest_wins(service, trainer, job):
    """While both workers are held up, snapshots of one block replace each other; all have receipts."""
    trainer.open(open_request(job, manifest((1024, 1024), (1024, 1024), (1024, 1024), (1024, 1024), (8,))))
    stream = trainer.attach()
    for block in range(4):
        stream.snapshot(block, 1, statistics(1024), statistics(1024))
    for step in range(1, 31):
        stream.snapshot(4, step, statistics(8, seed=step))
    stream.until(lambda: (4, 30) in stream.versions() and len(stream.receipts) == 34)
    small = [step for block, step in stream.versions() if block == 4]
    assert small == sorted(small)
    assert len(small) < 30
    np.testing.assert_allclose(
        stream.root(4, 30), expected_root(statistics(8, seed=30)), rtol=1e-4, atol=1e-5
    )


def test_snapshots_in_flight_are_all_computed_in_order(trainer, job):
    trainer.open(open_request(job, manifest((16,), in_flight=8)))
    stream = trainer.attach()
    for step in range(1, 9):
        stream.snapshot(0, step, statistics(16, seed=step))
    stream.until(lambda: len(stream.arrived) == 8)
    assert stream.versions() == [(0, step) for step in range(1, 9)]


def test_the_service_keeps_to_the_trainers_credit(trainer, job):
    size = 64 * 65 // 2 * 4
    trainer.open(open_request(job, manifest(*[(64,)] * 10)))
    stream = trainer.attach(credit_bytes=3 * size, answer=False)
    for block in range(10):
        stream.snapshot(block, 1, statistics(64))
    wait_for(lambda: trainer.job_status().preconditioners_published == 10)
    stream.until(lambda: len(stream.arrived) == 3)
    trainer.status()  # a round trip: what was under way is here
    assert len(stream.arrived) == 3
    stream.receipt(99, 1)  # never sent, so worth nothing
    stream.receipt(*stream.versions()[0])
    stream.receipt(*stream.versions()[0])  # a second one neither
    stream.until(lambda: len(stream.arrived) == 4)
    trainer.status()
    assert len(stream.arrived) == 4
    for version in stream.versions()[1:]:
        stream.receipt(*version)
    stream.until(lambda: len(stream.arrived) == 7)


def test_without_credit_one_block_is_under_way(trainer, job):
    trainer.open(open_request(job, manifest((64,), (64,))))
    stream = trainer.attach(credit_bytes=0, answer=False)
    stream.snapshot(0, 1, statistics(64))
    stream.snapshot(1, 1, statistics(64))
    stream.until(lambda: stream.arrived)
    trainer.status()
    assert len(stream.arrived) == 1
    stream.receipt(*stream.versions()[0])
    stream.until(lambda: len(stream.arrived) == 2)


def test_a_slow_reader_costs_bounded_memory_and_harms_nobody(service, trainer, job):
    """It sends 300 MB and reads nothing, while another job is served."""
    shapes = [(1024,)] * 10
    trainer.open(open_request(job, manifest(*shapes)))
    stream = trainer.attach(credit_bytes=1 << 40)
    resident = psutil.Process(service.process.pid).memory_info().rss
    stream.pause_reading()
    packed = pack(np.eye(1024, dtype=np.float32))
    for step in range(1, 16):
        stream.send(*(PackedBlock(block, step, (packed,)) for block in range(len(shapes))))
    other = service.trainer()
    other.open(open_request(job + "-other", manifest((8,))))
    quick = other.attach()
    for step in range(1, 4):
        quick.snapshot(0, step, statistics(8))
        quick.until(lambda step=step: (0, step) in quick.versions())
    other.close()
    wait_for(lambda: trainer.job_status().snapshots_received == 150)
    grown = psutil.Process(service.process.pid).memory_info().rss - resident
    # At most: per block one waiting, one computed, one kept; what gRPC buffers; and the allocator's slack.
    assert grown < 200e6, f"{grown / 1e6:.0f} MB"
    stream.resume_reading()
    stream.until(lambda: {(block, 15) for block in range(10)} <= set(stream.versions()))
    assert len(stream.receipts) == 150
    other.channel.close()


def test_half_close_is_answered_with_ok_and_all_receipts(trainer, job):
    trainer.open(open_request(job, manifest(*[(4,)] * 500)))
    stream = trainer.attach()
    stream.send(*(PackedBlock(block, 1, (pack(statistics(4)),)) for block in range(500)))
    stream.half_close()
    stream.until(lambda: stream.ended)
    assert stream.code is grpc.StatusCode.OK
    assert len(stream.receipts) == 500


def test_pushes_without_a_receipt_are_limited_in_number_too(monkeypatch):
    """However large the credit of bytes is that the trainer claims."""
    monkeypatch.setattr(exchange, "_MOST_SENT", 3)

    async def scenario():
        board = Board(1 << 30, 10.0)
        session, _ = board.open(open_request("job", manifest((1,))))
        stream = exchange.ExchangeStream(
            session, None, None,
            credit_bytes=2**40, max_message_bytes=2**20, idle_timeout=1.0, turns=exchange.Turns(),
        )  # fmt: skip
        board.attach(session, stream)
        pushed: list[int] = []

        def publish(step: int) -> None:
            session.publish(PackedBlock(0, step, (np.zeros(1, np.float32),)))
            pushed.extend(item.step for item in stream._pushes())

        for step in range(1, 6):
            publish(step)
        assert pushed == [1, 2, 3]
        stream._receipted(0, 1)
        pushed.extend(item.step for item in stream._pushes())
        assert pushed == [1, 2, 3, 5], "the newest, as it won meanwhile"
        assert stream.unanswered == 3

    asyncio.run(scenario())


def test_messages_of_tiny_matrices_leave_time_to_others():
    """While ordinary ones are read as fast as they come."""
    pauses: list[float] = []

    class Counted(exchange.Turns):
        async def take(self, pause=0.0):
            pauses.append(pause)
            await super().take(pause)

    class Context:
        def __init__(self, *messages):
            self._messages = iter([*messages, grpc.aio.EOF])

        async def read(self):
            return next(self._messages)

    async def read(side):
        pauses.clear()
        board, dispatcher = Board(1 << 30, 10.0), Dispatcher()
        session, _ = board.open(open_request("job", manifest(*[(side,)] * 200)))
        dispatcher.open(session)
        packed = pack(statistics(side))
        blocks = [PackedBlock(block, 1, (packed,)) for block in range(200)]
        messages = [m.SerializeToString() for m in chunk_messages(blocks, message=pb.TrainerMessage)]
        assert len(messages) == 1
        stream = exchange.ExchangeStream(
            session, Context(*messages), dispatcher,
            credit_bytes=0, max_message_bytes=2**20, idle_timeout=1.0, turns=Counted(),
        )  # fmt: skip
        await stream._read()
        assert session.job.counters.snapshots_received == 200
        return set(pauses)

    assert asyncio.run(read(4)) == {exchange._TINY_PAUSE}
    assert asyncio.run(read(64)) == {0.0}
