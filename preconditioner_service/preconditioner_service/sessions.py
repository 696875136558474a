"""One rank of a job in one epoch: its blocks, their latest statistics and their latest preconditioners.

Pure bookkeeping: no gRPC, no Ray, no clock. What a session holds is bounded by :func:`budget_bytes` of its
manifest, because latest wins: of one block at most ``depth`` snapshots wait, one is computed, and ``depth``
preconditioners are kept until their receipts.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from preconditioner_protos import Layout, PackedBlock, numpy_dtype
from preconditioner_protos.history import Kind
from preconditioner_protos.v1 import preconditioner_pb2 as pb
from preconditioner_service.history import SessionHistory
from preconditioner_service.shares import Share

MAX_DEPTH = 64
"""Largest ``snapshots_in_flight`` that is granted."""

_MOST_CLIENT = 100
"""Characters of the trainer's own description that are kept."""

_BLOCK_BYTES, _SESSION_BYTES = 2560, 16 * 1024
"""Of Python's objects for one, rounded up (measured: 2.3 kB for a block of two sides or of eight)."""

_ITEM_BYTES, _MATRIX_BYTES = 384, 144
"""Of Python's objects for a kept snapshot or preconditioner, and for each matrix of it, rounded up."""


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
    quarantined_until: float | None = None
    """See :mod:`preconditioner_service.quarantine`; ``None`` once a worker outlived the block."""
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
    """A training job: the fence of its epoch, its share of the workers, its sessions by rank, counters."""

    name: str
    epoch: int
    share: Share
    sessions: dict[int, Session] = field(default_factory=dict)
    counters: Counters = field(default_factory=Counters)


@dataclass(frozen=True, slots=True)
class Footprint:
    """The most bytes that a session can make the service hold.

    Attributes:
        packed: statistics and preconditioners; what quotas of jobs count.
        bookkeeping: the session's own objects, and the largest block while it is assembled.
    """

    packed: int
    bookkeeping: int

    @classmethod
    def of(cls, manifest: pb.Manifest) -> Footprint:
        """From a manifest that keeps to the protocol."""
        statistics, preconditioners = _layouts(manifest)
        sizes = [statistics.block_bytes(block) for block in range(len(statistics))]
        depth, total = depth_of(manifest), sum(sizes)
        packed = (depth + 1) * total + depth * (
            total // statistics.dtype.itemsize * preconditioners.dtype.itemsize
        )
        matrices = sum(map(len, statistics.sides))
        own = len(statistics) * _BLOCK_BYTES + 2 * manifest.ByteSize()
        own += (2 * depth + 1) * (len(statistics) * _ITEM_BYTES + matrices * _MATRIX_BYTES)
        return cls(packed, _SESSION_BYTES + own + max(sizes, default=0))

    @property
    def total(self) -> int:
        """All of it."""
        return self.packed + self.bookkeeping


class Plan:
    """What a session derives from its manifest: the part of opening one that takes long for many blocks.

    Args:
        request: checked against protocol and quotas.
        footprint: of its manifest, if it was reckoned before.
    """

    def __init__(self, request: pb.OpenSessionRequest, footprint: Footprint | None = None) -> None:
        manifest = request.manifest
        self.manifest_bytes = manifest.SerializeToString(deterministic=True)
        self.depth = depth_of(manifest)
        self.footprint = footprint or Footprint.of(manifest)
        self.statistics, self.preconditioners = _layouts(manifest)
        self.blocks = [
            BlockState(
                index,
                self.statistics.sides[index],
                tuple(side.root_order for side in block.sides),
                # A copy, since a part of a message keeps all of it in memory.
                pb.Ridge(kind=block.ridge.kind, value=block.ridge.value),
            )
            for index, block in enumerate(manifest.blocks)
        ]


class Session:
    """One rank of a job in one epoch. Made by :class:`Board` alone."""

    def __init__(self, job: Job, request: pb.OpenSessionRequest, plan: Plan) -> None:
        self.id = secrets.token_urlsafe(24)
        self.job = job
        self.rank: int = request.rank
        self.epoch: int = request.epoch
        self.world_size: int = request.world_size
        self.client: str = request.client[:_MOST_CLIENT]
        self.max_staleness: int = request.max_staleness
        self.manifest_bytes = plan.manifest_bytes
        self.depth = plan.depth
        self.footprint = plan.footprint
        self.statistics = plan.statistics
        self.preconditioners = plan.preconditioners
        self.blocks = plan.blocks
        self.dirty: OrderedDict[int, None] = OrderedDict()
        """Blocks with something to push, in the order in which they became so."""
        self.newest_step = 0
        self.stream: Stream | None = None
        self.closed = False
        self.expires_at = 0.0
        self.history: SessionHistory | None = None

    def __str__(self) -> str:
        return f"job={self.job.name} rank={self.rank} epoch={self.epoch}"

    def say(self, kind: Kind, **data: object) -> None:
        """Record what happened to the session, if it is recorded."""
        if self.history is not None:
            self.history.say(kind, **data)

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
        if self.history is not None:
            self.history.block(Kind.SNAPSHOT_ACCEPTED, snapshot.block, snapshot.step, snapshot.sides)
        return True

    def refused(self, index: int, step: int, reason: pb.NackReason) -> None:
        """Record that a snapshot was refused on arrival."""
        if self.history is not None:
            self.history.failed(Kind.SNAPSHOT_REFUSED, index, step, reason)

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
        if self.history is not None:
            self.history.failed(Kind.ROOT_FAILED, index, step, reason)
        if self.stream is not None:
            self.stream.nack(pb.Nack(block=index, step=step, reason=reason, detail=detail))

    # Preconditioners, on their way to the trainer.

    def publish(self, preconditioner: PackedBlock, retries: Sequence[int] = ()) -> None:
        """The computed block's result: kept until its receipt, or until newer ones take its place.

        Args:
            preconditioner: the result.
            retries: see ``RootOutcome``.
        """
        if self.closed:
            return
        block = self.blocks[preconditioner.block]
        block.computing = None
        block.losses = 0
        block.version = preconditioner.step
        block.unsent.append(preconditioner)
        self.job.counters.preconditioners_published += 1
        if self.history is not None:
            self.history.published(preconditioner, retries)
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
        if self.history is not None:
            self.history.block(Kind.PUSHED, index, preconditioner.step)
        del self.dirty[index]
        if block.unsent:
            self.dirty[index] = None  # behind the others, so that no block keeps them waiting
        return preconditioner

    def receipt(self, index: int, step: int) -> None:
        """The trainer has it; unknown ones are ignored (they were replaced meanwhile)."""
        if index < len(self.blocks):
            if self.history is not None:
                self.history.block(Kind.RECEIPTED, index, step)
            self.blocks[index].unreceipted.pop(step, None)

    def detach(self) -> None:
        """The stream is gone: what has no receipt is unsent again, in the order of its steps."""
        self.say(Kind.STREAM_DETACHED)
        self.stream = None
        for block in self.blocks:
            if block.unreceipted:
                block.unsent.extendleft(reversed(block.unreceipted.values()))
                block.unreceipted.clear()
                while len(block.unsent) > self.depth:
                    block.unsent.popleft()
                self.dirty[block.index] = None

    @property
    def budget_bytes(self) -> int:
        """The most packed bytes that may be held for this session."""
        return self.footprint.packed

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
    return Footprint.of(manifest).packed


def _layouts(manifest: pb.Manifest) -> tuple[Layout, Layout]:
    """Of statistics and of preconditioners; the sides, which take long to read, are the same."""
    statistics = Layout.of_statistics(manifest)
    return statistics, Layout(statistics.sides, numpy_dtype(manifest.preconditioner_dtype))
