"""The latest statistics and the latest preconditioners of every block of every session.

Pure bookkeeping: no gRPC, no Ray, no clock but the one handed in. Everything that it holds is bounded by
what a session was admitted with, because latest wins: of one block at most ``depth`` snapshots wait, one is
computed, and ``depth`` preconditioners are kept until their receipts.
"""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Protocol

from preconditioner_protos import Layout, PackedBlock
from preconditioner_protos.v1 import preconditioner_pb2 as pb

MAX_DEPTH = 64
"""Largest ``snapshots_in_flight`` that is granted."""

_FENCES = 4096
"""Jobs without a session whose last epoch is remembered, so that a zombie cannot take an old one up again."""


class Admission(Enum):
    """Why a session is not opened."""

    FENCED = auto()
    DIFFERENT_MANIFEST = auto()
    OVER_BUDGET = auto()


class AdmissionError(Exception):
    """A session is refused; the text is for the trainer's log."""

    def __init__(self, why: Admission, message: str) -> None:
        super().__init__(message)
        self.why = why


class Stream(Protocol):
    """What the board needs of the stream that is attached to a session. No call may block."""

    def wake(self) -> None:
        """There is something to push."""

    def nack(self, nack: pb.Nack) -> None:
        """Send this Nack."""

    def end(self, why: str) -> None:
        """End with ABORTED: another stream or a newer epoch took over."""

    @property
    def unanswered(self) -> int:
        """Preconditioners sent and not receipted."""


@dataclass(slots=True)
class BlockState:
    """One block of one session. Steps are those of the job's training loop."""

    index: int
    sides: tuple[int, ...]
    root_orders: tuple[float, ...]
    ridge: pb.Ridge
    newest: int | None = None
    """Step of the newest accepted snapshot."""
    version: int | None = None
    """Step of the newest published preconditioner."""
    waiting: deque[PackedBlock] = field(default_factory=deque)
    """Accepted snapshots, oldest first, of which none is computed yet."""
    computing: PackedBlock | None = None
    losses: int = 0
    """Times in a row that a worker died on this block."""
    unsent: deque[PackedBlock] = field(default_factory=deque)
    unreceipted: OrderedDict[int, PackedBlock] = field(default_factory=OrderedDict)
    """Sent ones by step, kept to be sent again if the stream breaks."""


@dataclass(slots=True)
class Counters:
    """Of one job, since its first session."""

    snapshots_received: int = 0
    preconditioners_published: int = 0
    nacks: int = 0


@dataclass(slots=True)
class Job:
    """A training job: the fence of its epoch, its sessions by rank, its counters."""

    name: str
    epoch: int
    sessions: dict[int, Session] = field(default_factory=dict)
    counters: Counters = field(default_factory=Counters)


class Session:
    """One rank of a job in one epoch. Made by :class:`Board` alone."""

    def __init__(self, job: Job, request: pb.OpenSessionRequest, budget_bytes: int) -> None:
        manifest = request.manifest
        self.id = secrets.token_urlsafe(24)
        self.job = job
        self.rank: int = request.rank
        self.epoch: int = request.epoch
        self.world_size: int = request.world_size
        self.client: str = request.client
        self.max_staleness: int = request.max_staleness
        self.manifest_bytes = manifest.SerializeToString(deterministic=True)
        self.depth = depth_of(manifest)
        self.budget_bytes = budget_bytes
        self.statistics = Layout.of_statistics(manifest)
        self.preconditioners = Layout.of_preconditioners(manifest)
        self.blocks = [
            BlockState(
                index,
                tuple(side.length for side in block.sides),
                tuple(side.root_order for side in block.sides),
                block.ridge,
            )
            for index, block in enumerate(manifest.blocks)
        ]
        self.dirty: OrderedDict[int, None] = OrderedDict()
        """Blocks with something to push, in the order in which they became so."""
        self.newest_step = 0
        self.stream: Stream | None = None
        self.closed = False
        self.expires_at = 0.0

    def __str__(self) -> str:
        return f"job={self.job.name} rank={self.rank} epoch={self.epoch}"

    # Snapshots, on their way to the workers.

    def accept(self, snapshot: PackedBlock) -> bool:
        """Take a whole snapshot; of one block at most ``depth`` wait, the oldest are dropped.

        Returns:
            False if it is not newer than the newest accepted one of its block: the answer is OUTDATED.
        """
        block = self.blocks[snapshot.block]
        if block.newest is not None and snapshot.step <= block.newest:
            return False
        block.newest = snapshot.step
        self.newest_step = max(self.newest_step, snapshot.step)
        block.waiting.append(snapshot)
        while len(block.waiting) > self.depth:
            block.waiting.popleft()
        self.job.counters.snapshots_received += 1
        return True

    def begin(self, index: int) -> PackedBlock | None:
        """The block's next snapshot, now being computed; ``None`` if none waits or one is under way."""
        if self.closed:
            return None
        block = self.blocks[index]
        if block.computing is not None or not block.waiting:
            return None
        block.computing = block.waiting.popleft()
        return block.computing

    def requeue(self, index: int) -> None:
        """The worker was lost: the snapshot waits again, unless newer ones fill its place."""
        if self.closed:
            return
        block = self.blocks[index]
        if block.computing is not None and len(block.waiting) < self.depth:
            block.waiting.appendleft(block.computing)
        block.computing = None

    def fail(self, index: int, step: int, reason: pb.NackReason, detail: str) -> None:
        """No preconditioner will come from this snapshot; the last good one stays."""
        if self.closed:
            return
        block = self.blocks[index]
        block.computing = None
        block.losses = 0
        self.job.counters.nacks += 1
        if self.stream is not None:
            self.stream.nack(pb.Nack(block=index, step=step, reason=reason, detail=detail))

    # Preconditioners, on their way to the trainer.

    def publish(self, preconditioner: PackedBlock) -> None:
        """The computed block's result: kept until its receipt, or until newer ones take its place."""
        if self.closed:
            return
        block = self.blocks[preconditioner.block]
        block.computing = None
        block.losses = 0
        block.version = preconditioner.step
        block.unsent.append(preconditioner)
        self.job.counters.preconditioners_published += 1
        while len(block.unsent) > self.depth:
            block.unsent.popleft()
        while block.unreceipted and len(block.unsent) + len(block.unreceipted) > self.depth:
            block.unreceipted.popitem(last=False)
        self.dirty[block.index] = None
        if self.stream is not None:
            self.stream.wake()

    def next_unsent(self) -> PackedBlock | None:
        """The preconditioner to push next, without taking it."""
        for index in self.dirty:
            return self.blocks[index].unsent[0]
        return None

    def take_unsent(self) -> PackedBlock:
        """Take what :meth:`next_unsent` shows; it is kept until its receipt."""
        index = next(iter(self.dirty))
        block = self.blocks[index]
        preconditioner = block.unsent.popleft()
        block.unreceipted[preconditioner.step] = preconditioner
        del self.dirty[index]
        if block.unsent:
            self.dirty[index] = None  # behind the others, so that no block keeps them waiting
        return preconditioner

    def receipt(self, index: int, step: int) -> None:
        """The trainer has it; unknown ones are ignored (they were replaced meanwhile)."""
        if index < len(self.blocks):
            self.blocks[index].unreceipted.pop(step, None)

    def detach(self) -> None:
        """The stream is gone: what has no receipt is unsent again, in the order of its steps."""
        self.stream = None
        for block in self.blocks:
            if block.unreceipted:
                block.unsent.extendleft(reversed(block.unreceipted.values()))
                block.unreceipted.clear()
                while len(block.unsent) > self.depth:
                    block.unsent.popleft()
                self.dirty[block.index] = None

    @property
    def pending(self) -> int:
        """Blocks with a waiting snapshot."""
        return sum(1 for block in self.blocks if block.waiting)

    @property
    def in_flight(self) -> int:
        """Blocks that are being computed."""
        return sum(1 for block in self.blocks if block.computing is not None)

    @property
    def settled(self) -> bool:
        """All that was acknowledged is computed, pushed and receipted."""
        if self.dirty or any(block.waiting or block.computing is not None for block in self.blocks):
            return False
        return self.stream is None or self.stream.unanswered == 0

    def held_bytes(self) -> int:
        """Packed bytes held for this session now."""
        return sum(
            sum(item.nbytes for item in (*block.waiting, *block.unsent, *block.unreceipted.values()))
            + (block.computing.nbytes if block.computing is not None else 0)
            for block in self.blocks
        )


def depth_of(manifest: pb.Manifest) -> int:
    """Snapshots of one block that are kept uncomputed."""
    return max(1, manifest.snapshots_in_flight)


def budget_bytes(manifest: pb.Manifest) -> int:
    """The most packed bytes that a session with this manifest can make the board hold."""
    depth = depth_of(manifest)
    statistics = Layout.of_statistics(manifest).total_bytes()
    preconditioners = Layout.of_preconditioners(manifest).total_bytes()
    return (depth + 1) * statistics + depth * preconditioners


class Board:
    """All jobs and sessions of one service.

    Args:
        budget_bytes: what all sessions together may make the board hold.
        session_ttl: seconds that a session without a stream lives.
        clock: monotonic seconds.
    """

    def __init__(
        self, budget_bytes: int, session_ttl: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._budget_bytes = budget_bytes
        self._session_ttl = session_ttl
        self._clock = clock
        self._jobs: dict[str, Job] = {}
        self._sessions: dict[str, Session] = {}
        self._fences: OrderedDict[str, Job] = OrderedDict()

    @property
    def jobs(self) -> list[Job]:
        """Jobs that have a session."""
        return list(self._jobs.values())

    @property
    def sessions(self) -> list[Session]:
        """All open sessions."""
        return list(self._sessions.values())

    def find(self, session_id: str) -> Session | None:
        """The open session of that id."""
        return self._sessions.get(session_id)

    def held_by_job(self, request: pb.OpenSessionRequest) -> int:
        """Budgets, in bytes, of the sessions that will stand beside the one asked for."""
        job = self._jobs.get(request.job)
        if job is None or job.epoch != request.epoch:
            return 0
        return sum(other.budget_bytes for rank, other in job.sessions.items() if rank != request.rank)

    def open(self, request: pb.OpenSessionRequest) -> tuple[Session, list[Session]]:
        """Open a session, or find the same one again.

        Args:
            request: checked against protocol and quotas.

        Returns:
            The session, and those that its epoch fenced.

        Raises:
            AdmissionError: the epoch is fenced, the rank announced other blocks in this epoch, or the budget
                does not hold it. Nothing changed.
        """
        job = self._jobs.get(request.job) or self._fences.get(request.job)
        if job is not None and request.epoch < job.epoch:
            raise AdmissionError(
                Admission.FENCED,
                f"epoch {request.epoch} of job {request.job!r} is fenced by epoch {job.epoch}",
            )
        same_epoch = job is not None and request.epoch == job.epoch
        if job is not None and same_epoch and (session := job.sessions.get(request.rank)) is not None:
            return self._again(session, request), []
        needed = budget_bytes(request.manifest)
        fenced = [] if job is None or same_epoch else list(job.sessions.values())
        held = sum(session.budget_bytes for session in self._sessions.values()) - sum(
            session.budget_bytes for session in fenced
        )
        if held + needed > self._budget_bytes:
            raise AdmissionError(
                Admission.OVER_BUDGET,
                f"the session needs up to {needed} bytes; of the "
                f"service's {self._budget_bytes} are free {max(0, self._budget_bytes - held)}",
            )
        for old in fenced:
            self.close(old, f"epoch {request.epoch} took over")
        if job is None:
            job = Job(request.job, request.epoch)
        job.epoch = request.epoch
        self._fences.pop(request.job, None)
        self._jobs[request.job] = job
        session = Session(job, request, needed)
        session.expires_at = self._clock() + self._session_ttl
        job.sessions[session.rank] = session
        self._sessions[session.id] = session
        return session, fenced

    def _again(self, session: Session, request: pb.OpenSessionRequest) -> Session:
        if request.manifest.SerializeToString(deterministic=True) != session.manifest_bytes:
            raise AdmissionError(
                Admission.DIFFERENT_MANIFEST,
                f"rank {request.rank} of job {request.job!r} announced another manifest in epoch "
                f"{request.epoch}; open a larger epoch",
            )
        session.max_staleness = request.max_staleness
        if session.stream is None:
            session.expires_at = self._clock() + self._session_ttl
        return session

    def attach(self, session: Session, stream: Stream) -> Stream | None:
        """Make this the session's stream.

        Returns:
            The stream that it supersedes, already told to end.
        """
        older = session.stream
        if older is not None:
            older.end("a newer stream of the session took over")
            session.detach()
        session.stream = stream
        return older

    def detach(self, session: Session, stream: Stream) -> bool:
        """A stream is gone; without another one the session lives for its ttl.

        Returns:
            False if the stream was superseded or the session closed before.
        """
        if session.closed or session.stream is not stream:
            return False
        session.detach()
        session.expires_at = self._clock() + self._session_ttl
        return True

    def close(self, session: Session, why: str) -> None:
        """Free all that is held for a session; its stream, if any, ends with ABORTED."""
        if session.closed:
            return
        session.closed = True
        if session.stream is not None:
            session.stream.end(why)
            session.stream = None
        session.blocks = []
        session.dirty.clear()
        del self._sessions[session.id]
        job = session.job
        del job.sessions[session.rank]
        if not job.sessions:
            del self._jobs[job.name]
            self._fences[job.name] = job
            while len(self._fences) > _FENCES:
                self._fences.popitem(last=False)

    def expire(self) -> Iterator[Session]:
        """Close the sessions whose stream has been gone for longer than the ttl."""
        now = self._clock()
        for session in list(self._sessions.values()):
            if session.stream is None and session.expires_at <= now:
                self.close(session, "its stream was gone for longer than session_ttl")
                yield session

    def status(self) -> Iterator[pb.JobStatus]:
        """What GetStatus says of every job."""
        for job in self._jobs.values():
            sessions = job.sessions.values()
            yield pb.JobStatus(
                job=job.name,
                epoch=job.epoch,
                ranks=len(sessions),
                blocks=sum(len(session.blocks) for session in sessions),
                snapshots_received=job.counters.snapshots_received,
                preconditioners_published=job.counters.preconditioners_published,
                nacks=job.counters.nacks,
                blocks_pending=sum(session.pending for session in sessions),
                blocks_in_flight=sum(session.in_flight for session in sessions),
            )
