"""Between board and pool, with a pool that the test holds in its hand."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest

from preconditioner_protos import PackedBlock
from preconditioner_protos.v1 import preconditioner_pb2 as pb
from preconditioner_service.board import Board
from preconditioner_service.dispatcher import Dispatcher
from preconditioner_service.pool import BatchLostError, Worker
from preconditioner_service.quarantine import Quarantine, QuarantineLimits
from preconditioner_service.scheduler import BatchLimits
from preconditioner_service.tasks import RootOutcome
from raw_trainer import manifest, open_request


class HandPool:
    """Batches stay where they are until the test answers them."""

    def __init__(self, workers: int) -> None:
        self.workers = [Worker(number, None, alive=True) for number in range(workers)]
        self.calls: list[tuple[Worker, list, asyncio.Future]] = []

    def run(self, worker, tasks, seconds):
        future = asyncio.get_running_loop().create_future()
        self.calls.append((worker, tasks, future))
        worker.batches.append(_Entry(seconds))

        async def answer():
            try:
                return await future
            finally:
                worker.batches.popleft()

        return answer()

    async def succeed(self, number: int = 0) -> None:
        _, tasks, future = self.calls.pop(number)
        future.set_result([RootOutcome(task.sides, tuple(0.001 for _ in task.sides)) for task in tasks])
        await settle()

    async def lose(self, number: int = 0, *, computing: bool = True) -> None:
        _, _, future = self.calls.pop(number)
        future.set_exception(BatchLostError("gone", computing))
        await settle()


class _Entry:
    def __init__(self, seconds):
        self.seconds = seconds


class Stream:
    unanswered = 0

    def __init__(self):
        self.nacks = []

    def wake(self):
        pass

    def nack(self, nack):
        self.nacks.append(nack)

    def end(self, why):
        pass


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


class Bench:
    def __init__(self, *shapes, workers=1, quarantine=None, **limits) -> None:
        self.board = Board(1 << 30, 10.0)
        self.dispatcher = Dispatcher(BatchLimits(**limits), quarantine)
        self.pool = HandPool(workers)
        self.dispatcher.use(self.pool)
        self.session, _ = self.board.open(open_request("job", manifest(*shapes)))
        self.dispatcher.open(self.session)
        self.stream = Stream()
        self.board.attach(self.session, self.stream)

    def snapshot(self, block: int, step: int) -> None:
        sides = self.session.statistics.sides[block]
        arrays = tuple(np.zeros(n * (n + 1) // 2, np.float32) for n in sides)
        assert self.session.accept(PackedBlock(block, step, arrays))
        self.dispatcher.enqueue(self.session, block)

    def published(self) -> list[tuple[int, int]]:
        found = []
        while self.session.next_unsent() is not None:
            item = self.session.take_unsent()
            found.append((item.block, item.step))
        return found


def run(scenario):
    asyncio.run(scenario())


def test_small_blocks_share_a_batch_and_at_most_two_batches_are_at_a_worker():
    async def scenario():
        bench = Bench(*[(4,)] * 10, blocks=4)
        for block in range(10):
            bench.snapshot(block, 1)
        bench.dispatcher.kick()
        assert [len(tasks) for _, tasks, _ in bench.pool.calls] == [4, 4]
        await bench.pool.succeed()
        assert [len(tasks) for _, tasks, _ in bench.pool.calls] == [4, 2]
        await bench.pool.succeed()
        await bench.pool.succeed()
        assert sorted(bench.published()) == [(block, 1) for block in range(10)]

    run(scenario)


def test_behind_a_long_batch_nothing_queues_and_idle_workers_come_first():
    async def scenario():
        bench = Bench(*[(2000,)] * 3, workers=2)
        for block in range(3):
            bench.snapshot(block, 1)
        bench.dispatcher.kick()
        assert [worker.number for worker, _, _ in bench.pool.calls] == [0, 1]
        bench.snapshot(2, 2)  # still waits, so the newer one will be computed
        await bench.pool.succeed()
        assert len(bench.pool.calls) == 2
        await bench.pool.succeed()
        await bench.pool.succeed()
        assert sorted(bench.published()) == [(0, 1), (1, 1), (2, 2)]

    run(scenario)


def test_a_snapshot_that_came_meanwhile_is_computed_next():
    async def scenario():
        bench = Bench((4,))
        bench.snapshot(0, 1)
        bench.dispatcher.kick()
        bench.snapshot(0, 2)
        bench.dispatcher.kick()
        assert len(bench.pool.calls) == 1
        await bench.pool.succeed()
        assert len(bench.pool.calls) == 1
        await bench.pool.succeed()
        assert bench.session.blocks[0].version == 2

    run(scenario)


def test_a_lost_batch_is_computed_again_each_suspect_alone():
    async def scenario():
        bench = Bench(*[(4,)] * 3)
        for block in range(3):
            bench.snapshot(block, 1)
        bench.dispatcher.kick()
        await bench.pool.lose()
        assert [len(tasks) for _, tasks, _ in bench.pool.calls] == [1, 1]
        for _ in range(3):
            await bench.pool.succeed()
        assert sorted(bench.published()) == [(0, 1), (1, 1), (2, 1)]
        assert all(block.losses == 0 for block in bench.session.blocks)

    run(scenario)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def poisoned(after=3):
    """A bench whose block 0 was set aside, and the clock of its quarantine."""
    clock = Clock()
    bench = Bench((4,), (4,), quarantine=Quarantine(QuarantineLimits(after=after, seconds=60.0), clock))
    return bench, clock


async def kill_with_block_0(bench, step):
    bench.snapshot(0, step)
    bench.dispatcher.kick()
    while bench.pool.calls:
        await bench.pool.lose()


def test_a_block_on_which_workers_die_is_set_aside_by_name_and_the_others_are_served():
    async def scenario():
        bench, _ = poisoned()
        bench.snapshot(0, 1)
        bench.dispatcher.kick()
        for _ in range(3):
            assert not bench.stream.nacks
            await bench.pool.lose()
        (nack,) = bench.stream.nacks
        assert (nack.block, nack.step, nack.reason) == (0, 1, pb.NACK_REASON_WORKER_LOST)
        assert "quarantine" in nack.detail
        bench.snapshot(0, 2)
        bench.snapshot(1, 2)
        bench.dispatcher.kick()
        assert [(nack.block, nack.step) for nack in bench.stream.nacks] == [(0, 1), (0, 2)]
        await bench.pool.succeed()
        assert bench.published() == [(1, 2)]
        assert not bench.pool.calls

    run(scenario)


def test_after_its_time_a_quarantined_block_has_one_try():
    async def scenario():
        bench, clock = poisoned()
        await kill_with_block_0(bench, 1)
        clock.now = 60.0
        bench.snapshot(0, 2)
        bench.dispatcher.kick()
        await bench.pool.lose()
        assert [nack.step for nack in bench.stream.nacks] == [1, 2]
        clock.now = 119.0
        bench.snapshot(0, 3)
        assert [nack.step for nack in bench.stream.nacks] == [1, 2, 3]
        clock.now = 120.0
        bench.snapshot(0, 4)
        bench.dispatcher.kick()
        await bench.pool.succeed()
        assert bench.published() == [(0, 4)]
        # It lived: the whole budget is back.
        bench.snapshot(0, 5)
        bench.dispatcher.kick()
        await bench.pool.lose()
        await bench.pool.succeed()
        assert bench.published() == [(0, 5)]

    run(scenario)


@pytest.mark.parametrize("after", [1, 3])
def test_blocks_that_share_a_batch_with_a_deadly_one_are_not_set_aside(after):
    """Nor when it is tried again after its quarantine: it travels alone then."""

    async def scenario():
        bench, clock = poisoned(after=after)
        bench.snapshot(0, 1)
        bench.snapshot(1, 1)
        bench.dispatcher.kick()
        assert len(bench.pool.calls[0][1]) == 2
        await bench.pool.lose()
        await bench.pool.succeed(1)
        for _ in range(max(after - 1, 1)):
            await bench.pool.lose()
        assert bench.published() == [(1, 1)]
        assert [(nack.block, nack.step) for nack in bench.stream.nacks] == [(0, 1)]
        clock.now = 60.0
        bench.snapshot(0, 2)
        bench.snapshot(1, 2)
        bench.dispatcher.kick()
        assert [len(tasks) for _, tasks, _ in bench.pool.calls] == [1, 1]

    run(scenario)


def test_the_operator_ends_quarantines():
    async def scenario():
        bench, _ = poisoned(after=1)
        await kill_with_block_0(bench, 1)
        assert bench.dispatcher.release() == 1
        assert bench.dispatcher.release() == 0
        bench.snapshot(0, 2)
        bench.dispatcher.kick()
        await bench.pool.succeed()
        assert bench.published() == [(0, 2)]

    run(scenario)


def test_a_new_epoch_begins_without_quarantine():
    async def scenario():
        bench, _ = poisoned(after=1)
        await kill_with_block_0(bench, 1)
        session, fenced = bench.board.open(open_request("job", manifest((4,), (4,)), epoch=2))
        for old in fenced:
            bench.dispatcher.close(old)
        bench.session = session
        bench.dispatcher.open(session)
        bench.snapshot(0, 1)
        bench.dispatcher.kick()
        await bench.pool.succeed()
        assert bench.published() == [(0, 1)]
        assert bench.dispatcher.release() == 0

    run(scenario)


def test_who_only_queued_behind_a_death_is_not_blamed():
    async def scenario():
        bench = Bench((4,))
        bench.snapshot(0, 1)
        bench.dispatcher.kick()
        for _ in range(10):
            await bench.pool.lose(computing=False)
        assert not bench.stream.nacks
        await bench.pool.succeed()
        assert bench.published() == [(0, 1)]

    run(scenario)


def test_a_lost_snapshot_yields_to_a_newer_one():
    async def scenario():
        bench = Bench((4,))
        bench.snapshot(0, 1)
        bench.dispatcher.kick()
        bench.snapshot(0, 2)
        await bench.pool.lose()
        await bench.pool.succeed()
        assert not bench.pool.calls
        assert bench.published() == [(0, 2)]

    run(scenario)


def test_a_failed_root_is_a_nack_and_the_rest_of_its_batch_is_published():
    async def scenario():
        bench = Bench((4,), (4,))
        bench.snapshot(0, 1)
        bench.snapshot(1, 1)
        bench.dispatcher.kick()
        _, tasks, future = bench.pool.calls.pop()
        bad = RootOutcome(None, (0.0,), pb.NACK_REASON_INDEFINITE, "side 0: negative")
        future.set_result([bad, RootOutcome(tasks[1].sides, (0.001,))])
        await settle()
        (nack,) = bench.stream.nacks
        assert (nack.block, nack.reason, nack.detail) == (0, pb.NACK_REASON_INDEFINITE, "side 0: negative")
        assert bench.published() == [(1, 1)]

    run(scenario)


@pytest.mark.parametrize("lost", [False, True])
def test_a_session_closed_meanwhile(lost):
    async def scenario():
        bench = Bench((4,), (2000,), (2000,))
        for block in range(3):
            bench.snapshot(block, 1)
        bench.dispatcher.kick()
        bench.board.close(bench.session, "done")
        bench.dispatcher.close(bench.session)
        await (bench.pool.lose() if lost else bench.pool.succeed())
        while bench.pool.calls:
            await bench.pool.succeed()
        assert not bench.stream.nacks

    run(scenario)


def test_dead_workers_get_no_work_until_they_are_back():
    async def scenario():
        bench = Bench((4,))
        (worker,) = bench.pool.workers
        worker.alive = False
        bench.snapshot(0, 1)
        bench.dispatcher.kick()
        assert not bench.pool.calls
        worker.alive = True
        bench.dispatcher.kick()
        await bench.pool.succeed()
        assert bench.published() == [(0, 1)]

    run(scenario)


def test_a_job_held_back_by_its_rate_goes_on_by_itself_with_its_newest_snapshot():
    async def scenario():
        bench = Bench((4,))
        bench.session.job.share.max_refresh_rate = 2.0
        began = time.monotonic()
        for step in (1, 2):  # the bucket is empty then
            bench.snapshot(0, step)
            bench.dispatcher.kick()
            await bench.pool.succeed()
        for step in (3, 4):
            bench.snapshot(0, step)
            bench.dispatcher.kick()
        calls = len(bench.pool.calls)
        assert not calls or time.monotonic() - began > 0.5
        until = time.monotonic() + 10
        published = []
        while published[-1:] != [(0, 4)] and time.monotonic() < until:
            await (bench.pool.succeed() if bench.pool.calls else asyncio.sleep(0.005))
            published += bench.published()
        assert published[-1] == (0, 4)
        await bench.dispatcher.stop()

    run(scenario)


def test_an_unforeseen_failure_is_a_lost_batch_and_its_blocks_are_tried_again():
    async def scenario():
        bench = Bench((4,), quarantine=Quarantine(QuarantineLimits(after=3)))
        bench.snapshot(0, 1)
        bench.dispatcher.kick()
        for _ in range(2):
            bench.pool.calls.pop()[2].set_exception(MemoryError())
            await settle()
        await bench.pool.succeed()
        assert bench.published() == [(0, 1)]
        bench.snapshot(0, 2)
        bench.dispatcher.kick()
        for _ in range(3):
            bench.pool.calls.pop()[2].set_exception(MemoryError())
            await settle()
        assert not bench.pool.calls, "it is not tried for ever"
        assert "MemoryError" in bench.stream.nacks[0].detail

    run(scenario)


def test_work_in_flight_is_given_back_by_results_losses_and_closed_sessions():
    async def scenario():
        bench = Bench(*[(64,)] * 4, blocks=1)
        share = bench.session.job.share
        share.max_in_flight_seconds = 1e-9
        for block in range(4):
            bench.snapshot(block, 1)
        bench.dispatcher.kick()
        assert len(bench.pool.calls) == 1, "one block may always be in flight, and no second"
        await bench.pool.succeed()
        assert len(bench.pool.calls) == 1
        await bench.pool.lose()
        assert len(bench.pool.calls) == 1
        bench.board.close(bench.session, "over")
        bench.dispatcher.close(bench.session)
        await bench.pool.succeed()
        assert share.hold(0.0, 1.0) is None

    run(scenario)
