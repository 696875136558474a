"""Which blocks are computed next: the policy alone, without Ray, gRPC or a clock.

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
idle starts at the virtual time of the last choice: it has neither credit nor debt.

**Batches.** Small blocks travel together, since one call to a worker costs as much as a small root.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeAlias, TypeVar

NOMINAL_STALENESS = 200
"""Steps by which ages of jobs without a bound are measured."""

_LARGEST_AGE = 8.0
"""Of the bound: beyond it claims do not make a block more urgent."""

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
class _Share:
    """What one job was given of the workers."""

    weight: float = 1.0
    virtual: float = 0.0
    """Seconds of work divided by the weight, beside those that others had while it was idle."""
    waiting: int = 0
    sources: dict[_Source[Any], None] = field(default_factory=dict)

    def charge(self, seconds: float) -> None:
        """Count work; negative if less was used than was counted before."""
        self.virtual += seconds / self.weight


@dataclass(slots=True, eq=False)
class _Source(Generic[SourceT]):
    """A session's part of what the policy knows."""

    name: SourceT
    share: _Share
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
        self._shares: dict[str, _Share] = {}
        self._arrivals = itertools.count()
        self._virtual = 0.0

    def __len__(self) -> int:
        """Waiting blocks."""
        return sum(share.waiting for share in self._shares.values())

    def open(self, source: SourceT, job: str, max_staleness: int, weight: float = 1.0) -> None:
        """Learn of a session, or of its new bound, or of its job's new weight.

        Args:
            source: the session.
            job: all sessions of a job share what it is given.
            max_staleness: in steps; 0 means that none was declared.
            weight: of the job, > 0.
        """
        bound = max_staleness or NOMINAL_STALENESS
        share = self._shares.setdefault(job, _Share())
        share.weight = weight
        if (known := self._sources.get(source)) is not None:
            known.bound = bound
            return
        known = self._sources[source] = _Source(source, share, bound)
        share.sources[known] = None

    def close(self, source: SourceT, job: str) -> None:
        """Forget a session and its waiting blocks."""
        known = self._sources.pop(source, None)
        if known is None:
            return
        share = known.share
        share.waiting -= len(known.waiting)
        del share.sources[known]
        if not share.sources:
            del self._shares[job]

    def charge(self, source: SourceT, seconds: float) -> None:
        """Count work beyond the estimate, or below it if negative, once it is known."""
        if (known := self._sources.get(source)) is not None:
            known.share.charge(seconds)

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
        share = known.share
        if share.waiting == 0:
            share.virtual = max(share.virtual, self._virtual)
        share.waiting += 1
        known.waiting.add(block)
        group = known.groups.get((lengths, alone))
        if group is None:
            group = known.groups[lengths, alone] = _Group(next(self._arrivals), lengths, nbytes, alone)
        heapq.heappush(group.heap, (-1 if version is None else version, next(self._arrivals), block))

    def next_batch(self) -> Batch[SourceT] | None:
        """Take the blocks of the least served jobs, of each the most urgent; ``None`` if none waits."""
        queue = [
            (share.virtual, heads[0][0], number, share, heads)
            for number, share in enumerate(self._shares.values())
            if share.waiting and (heads := self._heads(share))
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
            full = sum(estimates) + cost > limits.seconds or nbytes + group.nbytes > limits.nbytes
            if taken and (full or group.alone or len(taken) >= limits.blocks):
                break
            self._virtual = max(self._virtual, virtual)
            taken.append((known.name, self._take(known, group, cost)))
            estimates.append(cost)
            nbytes += group.nbytes
            if group.heap:
                heapq.heapreplace(heads, (self._urgency(known, group), group.number, known, group))
            else:
                heapq.heappop(heads)
            if heads:
                heapq.heapreplace(queue, (share.virtual, heads[0][0], number, share, heads))
            else:
                heapq.heappop(queue)
            if group.alone:
                break
        return Batch(tuple(taken), tuple(estimates)) if taken else None

    def _heads(self, share: _Share) -> list[_Head[SourceT]]:
        """The groups of a job that have waiting blocks, as a heap."""
        heads = [
            (self._urgency(known, group), group.number, known, group)
            for known in share.sources
            if known.waiting
            for group in known.groups.values()
            if group.heap
        ]
        heapq.heapify(heads)
        return heads

    def _take(self, known: _Source[SourceT], group: _Group, cost: float) -> int:
        _, _, block = heapq.heappop(group.heap)
        known.waiting.discard(block)
        known.share.waiting -= 1
        known.share.charge(cost)
        return block

    def _urgency(self, known: _Source[SourceT], group: _Group) -> tuple[bool, float]:
        """Sorts the most urgent first."""
        version, _, _ = group.heap[0]
        root_cost = math.sqrt(self._estimate(group.lengths))
        return (False, root_cost) if version < 0 else (True, -known.age(version) / root_cost)
