"""Which blocks are computed next: the policy alone, without Ray, gRPC or a clock of its own.

**Priority.** A waiting block's priority is ``age / sqrt(cost)``. Its age is how many steps its published
version lies behind the newest step that its session has shown, as a fraction of the job's ``max_staleness``
(of :data:`NOMINAL_STALENESS` where none was declared). Why the square root: refreshing block i every T_i
seconds costs c_i / T_i of the workers and leaves a mean age proportional to T_i; the sum of ages is least,
for a given total of work, where T_i is proportional to sqrt(c_i), so where age_i / sqrt(c_i) is equal for
all. (Our own inference, not a published result.) Blocks without any version come before all others, the
cheapest first, as each is served by the diagonal method alone until then.

**Between jobs.** Steps are claimed by trainers, and one job must not starve another. So urgency decides among
the blocks of one job alone; between jobs it is weighted fair queueing by start times (Goyal, Vin and Cheng,
"Start-time fair queueing", SIGCOMM 1996). A job's virtual time is the work that it was given divided by its
weight; the next block is of the waiting job whose virtual time is least. While two jobs wait without a break,
what they were given differs, each divided by its weight, by no more than one block's work. A job that was
idle starts at the virtual time of the last choice, with neither credit nor debt; so does one that its quotas
held back (:mod:`preconditioner_service.shares`).

**Batches.** Small blocks travel together, since one call to a worker costs as much as a small root.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeAlias, TypeVar

from preconditioner_service.shares import Hold, Share

NOMINAL_STALENESS = 200
"""Steps by which ages of jobs without a bound are measured."""

_LARGEST_AGE = 8.0
"""Of the bound: beyond it claims do not make a block more urgent."""

_FRESH = 128
"""Groups whose urgency is reckoned anew for each batch, on average: more would hold up the streams."""

SourceT = TypeVar("SourceT", bound=Hashable)


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """Where a batch ends; the block that comes first travels however large it is.

    Attributes:
        seconds: estimated work.
        blocks: number of blocks.
        nbytes: packed bytes.
    """

    seconds: float = 0.010
    blocks: int = 64
    nbytes: int = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Batch(Generic[SourceT]):
    """Blocks for one call to a worker, in the order of their choice.

    Attributes:
        blocks: session and index of each.
        estimates: seconds that each is thought to take, and was charged for.
    """

    blocks: tuple[tuple[SourceT, int], ...]
    estimates: tuple[float, ...]

    @property
    def seconds(self) -> float:
        """What all of them are thought to take."""
        return sum(self.estimates)


@dataclass(slots=True, eq=False)
class _Job:
    """A job that has sessions."""

    sources: dict[_Source[Any], None] = field(default_factory=dict)
    heads: list[_Head[Any]] = field(default_factory=list)
    """A heap of the groups that have waiting blocks, of each session."""
    batches: int = 0
    """Begun since the urgencies in ``heads`` were reckoned."""
    waiting: int = 0
    held: bool = True
    """It was idle, or its quotas held it back, since its last block."""


@dataclass(slots=True, eq=False)
class _Source(Generic[SourceT]):
    """A session's part of what the policy knows."""

    name: SourceT
    job: _Job
    bound: int
    newest_step: int = 0
    groups: dict[tuple[tuple[int, ...], bool], _Group] = field(default_factory=dict)
    waiting: set[int] = field(default_factory=set)

    def age(self, version: int) -> float:
        """Of a version, as a fraction of the bound."""
        return min(max(self.newest_step - version, 0) / self.bound, _LARGEST_AGE)


@dataclass(slots=True, eq=False)
class _Group:
    """Waiting blocks of one session with the same sides: they age alike, so the oldest version leads."""

    number: int
    lengths: tuple[int, ...]
    nbytes: int
    alone: bool
    root_cost: float = 0.0
    """Square root of a block's estimate, as of the last block that came first or was taken."""
    heap: list[tuple[int, int, int]] = field(default_factory=list)
    """(version or -1, order of arrival, block)."""


_Head: TypeAlias = "tuple[tuple[bool, float], int, _Source[SourceT], _Group]"
"""Urgency and number of a group, which order it, and where it belongs."""


class Scheduler(Generic[SourceT]):
    """The waiting blocks of all sessions, and the order in which they are computed.

    Args:
        estimate: seconds of one worker for a block with these side lengths.
        limits: of a batch.
    """

    def __init__(self, estimate: Callable[[Iterable[int]], float], limits: BatchLimits | None = None) -> None:
        self._estimate = estimate
        self._limits = limits or BatchLimits()
        self._sources: dict[SourceT, _Source[SourceT]] = {}
        self._jobs: dict[Share, _Job] = {}
        self._arrivals = itertools.count()
        self._virtual = 0.0
        self._held: dict[Share, Hold] = {}

    def __len__(self) -> int:
        """Waiting blocks."""
        return sum(job.waiting for job in self._jobs.values())

    @property
    def held(self) -> Mapping[Share, Hold]:
        """The jobs whose quotas kept waiting blocks of theirs out of the last :meth:`next_batch`."""
        return self._held

    def open(self, source: SourceT, share: Share, max_staleness: int) -> None:
        """Learn of a session, or of its new bound.

        Args:
            source: the session.
            share: its job's.
            max_staleness: in steps; 0 means that none was declared.
        """
        bound = max_staleness or NOMINAL_STALENESS
        if (known := self._sources.get(source)) is not None:
            known.bound = bound
            return
        job = self._jobs.setdefault(share, _Job())
        known = self._sources[source] = _Source(source, job, bound)
        job.sources[known] = None

    def close(self, source: SourceT, share: Share) -> None:
        """Forget a session and its waiting blocks."""
        known = self._sources.pop(source, None)
        if known is None:
            return
        job = known.job
        job.waiting -= len(known.waiting)
        del job.sources[known]
        job.heads = [head for head in job.heads if head[2] is not known]
        heapq.heapify(job.heads)
        if not job.sources:
            del self._jobs[share]

    def push(
        self,
        source: SourceT,
        block: int,
        *,
        lengths: tuple[int, ...],
        nbytes: int,
        version: int | None,
        newest_step: int,
        alone: bool = False,
    ) -> None:
        """A block has a snapshot to compute. One that waits already keeps its place.

        Args:
            source: its session.
            block: its index there.
            lengths: of its sides.
            nbytes: of its packed statistics.
            version: step of its published preconditioner.
            newest_step: the newest step that the session has shown.
            alone: it shares no batch, because a worker died on it.
        """
        known = self._sources[source]
        known.newest_step = max(known.newest_step, newest_step)
        if block in known.waiting:
            return
        job = known.job
        job.held |= job.waiting == 0  # it was idle
        job.waiting += 1
        known.waiting.add(block)
        group = known.groups.get((lengths, alone))
        if group is None:
            group = known.groups[lengths, alone] = _Group(next(self._arrivals), lengths, nbytes, alone)
        heapq.heappush(group.heap, (-1 if version is None else version, next(self._arrivals), block))
        if len(group.heap) == 1:
            group.root_cost = math.sqrt(self._estimate(lengths))
            heapq.heappush(job.heads, (self._urgency(known, group), group.number, known, group))

    def next_batch(self, now: float = 0.0) -> Batch[SourceT] | None:
        """Take the blocks of the least served jobs, of each the most urgent; ``None`` if none may be taken.

        Args:
            now: monotonic seconds, for the jobs' quotas.
        """
        self._held = {}
        queue = [
            (share.virtual, heads[0][0], number, share, heads)
            for number, (share, job) in enumerate(self._jobs.items())
            if job.waiting and self._may_take(share, job, heads := self._heads(job), now)
        ]
        heapq.heapify(queue)
        taken: list[tuple[SourceT, int]] = []
        estimates: list[float] = []
        nbytes = 0
        limits = self._limits
        while queue:
            virtual, _, number, share, heads = queue[0]
            _, _, known, group = heads[0]
            cost = self._estimate(group.lengths)
            group.root_cost = math.sqrt(cost)
            full = sum(estimates) + cost > limits.seconds or nbytes + group.nbytes > limits.nbytes
            if taken and (full or group.alone or len(taken) >= limits.blocks):
                break
            self._virtual = max(self._virtual, virtual)
            share.take(cost)
            taken.append((known.name, self._take(known, group)))
            estimates.append(cost)
            nbytes += group.nbytes
            if group.heap:
                heapq.heapreplace(heads, (self._urgency(known, group), group.number, known, group))
            else:
                heapq.heappop(heads)
            if heads and self._may_take(share, known.job, heads, now):
                heapq.heapreplace(queue, (share.virtual, heads[0][0], number, share, heads))
            else:
                heapq.heappop(queue)
            if group.alone:
                break
        return Batch(tuple(taken), tuple(estimates)) if taken else None

    def _may_take(self, share: Share, job: _Job, heads: list[_Head[SourceT]], now: float) -> bool:
        hold = share.hold(now, self._estimate(heads[0][3].lengths))
        if hold is not None:
            self._held[share] = hold
            job.held = True
            return False
        if job.held:
            share.virtual = max(share.virtual, self._virtual)
            job.held = False
        return True

    def _heads(self, job: _Job) -> list[_Head[SourceT]]:
        """The groups of a job that have waiting blocks, as a heap.

        As steps go by, urgencies change. Those of few groups are of now; of more than :data:`_FRESH` they are
        of some batches ago, except where a group began to wait, or gave a block, since then.
        """
        job.batches += 1
        if job.batches * _FRESH >= len(job.heads):
            job.batches = 0
            job.heads = [
                (self._urgency(known, group), number, known, group) for _, number, known, group in job.heads
            ]
            heapq.heapify(job.heads)
        return job.heads

    def _take(self, known: _Source[SourceT], group: _Group) -> int:
        _, _, block = heapq.heappop(group.heap)
        known.waiting.discard(block)
        known.job.waiting -= 1
        return block

    def _urgency(self, known: _Source[SourceT], group: _Group) -> tuple[bool, float]:
        """Sorts the most urgent first."""
        version, _, _ = group.heap[0]
        return (False, group.root_cost) if version < 0 else (True, -known.age(version) / group.root_cost)
