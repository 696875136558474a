"""From waiting snapshots to published preconditioners: hands the scheduler's batches to the pool.

Idempotent by construction: a snapshot is named by (session, block, step), a lost batch's snapshots wait again
unless newer ones took their place, and a result whose session is gone is dropped.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Coroutine, Sequence
from typing import Any, Protocol

from preconditioner_protos import PackedBlock
from preconditioner_protos.v1 import preconditioner_pb2 as pb
from preconditioner_service.costs import CostModel
from preconditioner_service.logs import event, limited
from preconditioner_service.pool import BatchLostError, Worker
from preconditioner_service.quarantine import Quarantine
from preconditioner_service.scheduler import Batch, BatchLimits, Scheduler
from preconditioner_service.sessions import Session
from preconditioner_service.tasks import RootOutcome, RootTask

_QUARANTINED = (
    "the block is in quarantine: its snapshots are refused until a new epoch, until it is tried again "
    "(--quarantine-seconds), or until the operator sends the service SIGUSR1"
)

_MOST_WHY = 500
"""Characters of an unforeseen error in the log."""


class Pool(Protocol):
    """What is needed of :class:`preconditioner_service.pool.RayPool`."""

    @property
    def workers(self) -> Sequence[Worker]:
        """All of them, alive or not."""

    def run(
        self, worker: Worker, tasks: Sequence[RootTask], seconds: float
    ) -> Coroutine[Any, Any, list[RootOutcome]]:
        """Compute, or raise ``BatchLostError``."""


class Dispatcher:
    """Keeps every free worker busy while snapshots wait.

    Args:
        limits: of a batch.
        quarantine: for blocks on which workers die.
    """

    def __init__(self, limits: BatchLimits | None = None, quarantine: Quarantine | None = None) -> None:
        self._quarantine = quarantine or Quarantine()
        self._sessions: set[Session] = set()
        self._costs = CostModel()
        self._scheduler: Scheduler[Session] = Scheduler(self._costs.estimate, limits)
        self._pool: Pool | None = None
        self._running: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None

    def use(self, pool: Pool) -> None:
        """Set the pool, before any snapshot comes."""
        self._pool = pool

    def open(self, session: Session) -> None:
        """A session may hand in snapshots from now on; or it has another bound now."""
        self._sessions.add(session)
        self._scheduler.open(session, session.job.share, session.max_staleness)

    def close(self, session: Session) -> None:
        """Drop what waits of a session."""
        self._sessions.discard(session)
        self._scheduler.close(session, session.job.share)

    def kick(self) -> None:
        """Hand out work to free workers; call whenever one became free or work came in."""
        if self._pool is None:
            return
        while (worker := _least_busy(self._pool.workers)) is not None:
            batch = self._scheduler.next_batch(time.monotonic())
            if batch is None:
                self._await_quotas()
                return
            self._start(worker, batch)

    def _await_quotas(self) -> None:
        """Come back when a job that its quotas hold back may go on."""
        held = self._scheduler.held
        for share, hold in held.items():
            limited(logging.INFO, "held back by quota", share.name, job=share.name, why=hold.why)
        until = min((hold.until for hold in held.values()), default=math.inf)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if until < math.inf:
            self._timer = asyncio.get_running_loop().call_later(until - time.monotonic(), self.kick)

    def enqueue(self, session: Session, index: int) -> None:
        """A block of the session may have a waiting snapshot; :meth:`kick` once all such are told."""
        if session.closed:
            return
        block = session.blocks[index]
        if self._quarantine.holds(block):
            while block.waiting:
                self._fail(session, block.waiting.popleft(), pb.NACK_REASON_WORKER_LOST, _QUARANTINED)
        elif block.computing is None and block.waiting:
            self._scheduler.push(
                session,
                index,
                lengths=block.sides,
                nbytes=session.statistics.block_bytes(index),
                version=block.version,
                newest_step=session.newest_step,
                alone=block.losses > 0 or block.quarantined_until is not None,
            )

    def _start(self, worker: Worker, batch: Batch[Session]) -> None:
        work = []
        for (session, index), estimate in zip(batch.blocks, batch.estimates, strict=True):
            if (snapshot := session.begin(index)) is not None:
                work.append((session, snapshot, estimate))
            else:
                session.job.share.done(estimate, 0.0)
        if not work or self._pool is None:
            return
        tasks = [_task(session, snapshot) for session, snapshot, _ in work]
        running = self._pool.run(worker, tasks, batch.seconds)
        task = asyncio.get_running_loop().create_task(self._finish(running, work))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _finish(
        self, running: Awaitable[list[RootOutcome]], work: list[tuple[Session, PackedBlock, float]]
    ) -> None:
        try:
            outcomes = await running
        except Exception as error:
            if isinstance(error, BatchLostError):
                lost = error
            else:  # as for want of memory here; its blocks must not wait for ever
                event(logging.ERROR, "batch failed", why=repr(error)[:_MOST_WHY])
                lost = BatchLostError(type(error).__name__, computing=True)
            for session, snapshot, estimate in work:
                session.job.share.done(estimate)
                self._lost(session, snapshot, lost, shared=len(work) > 1)
        else:
            for (session, snapshot, estimate), outcome in zip(work, outcomes, strict=True):
                # A job pays for what its matrices took; failures do not say, so there the estimate stands.
                session.job.share.done(estimate, None if outcome.sides is None else sum(outcome.seconds))
                self._settle(session, snapshot, outcome)
        for session, snapshot, _ in work:
            self.enqueue(session, snapshot.block)
        self.kick()

    def _settle(self, session: Session, snapshot: PackedBlock, outcome: RootOutcome) -> None:
        if session.closed:
            return
        session.blocks[snapshot.block].quarantined_until = None
        for length, seconds in zip(session.statistics.sides[snapshot.block], outcome.seconds, strict=True):
            self._costs.observe(length, seconds)
        if outcome.sides is not None:
            session.publish(PackedBlock(snapshot.block, snapshot.step, outcome.sides), outcome.retries)
        else:
            self._fail(session, snapshot, outcome.reason, outcome.detail)

    def _lost(self, session: Session, snapshot: PackedBlock, error: BatchLostError, *, shared: bool) -> None:
        if session.closed:
            return
        block = session.blocks[snapshot.block]
        if not error.computing or not self._quarantine.lost(block, shared=shared):
            session.requeue(snapshot.block)
            return
        event(
            logging.ERROR,
            "block quarantined",
            job=session.job.name,
            rank=session.rank,
            epoch=session.epoch,
            block=snapshot.block,
            sides=block.sides,
            step=snapshot.step,
            workers_lost=block.losses,
            seconds=self._quarantine.limits.seconds,
            why=error,
        )
        detail = f"{block.losses} workers in a row were lost on it ({error}). {_QUARANTINED}"
        self._fail(session, snapshot, pb.NACK_REASON_WORKER_LOST, detail)

    def _fail(self, session: Session, snapshot: PackedBlock, reason: pb.NackReason, detail: str) -> None:
        limited(
            logging.WARNING,
            "nack",
            (session.id, reason),
            job=session.job.name,
            rank=session.rank,
            epoch=session.epoch,
            block=snapshot.block,
            step=snapshot.step,
            reason=pb.NackReason.Name(reason),
            detail=detail,
        )
        session.fail(snapshot.block, snapshot.step, reason, detail)

    def release(self) -> int:
        """End every quarantine now: the next snapshots have the whole budget again.

        Returns:
            How many blocks were set aside.
        """
        held = [block for session in self._sessions for block in session.blocks if block.quarantined_until]
        for block in held:
            block.quarantined_until = None
            block.losses = 0
        return len(held)

    async def stop(self) -> None:
        """Give up what is being computed."""
        if self._timer is not None:
            self._timer.cancel()
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)


def _least_busy(workers: Sequence[Worker]) -> Worker | None:
    free = [worker for worker in workers if worker.free]
    return min(free, key=lambda worker: len(worker.batches), default=None)


def _task(session: Session, snapshot: PackedBlock) -> RootTask:
    block = session.blocks[snapshot.block]
    return RootTask(
        lengths=block.sides,
        root_orders=block.root_orders,
        ridge_kind=block.ridge.kind,
        ridge_value=block.ridge.value,
        dtype=session.preconditioners.dtype.str,
        sides=snapshot.sides,
    )
