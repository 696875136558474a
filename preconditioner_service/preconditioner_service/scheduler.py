"""Which blocks are computed next: the policy alone, without Ray, gRPC or a clock.

**Priority.** A waiting block's priority is ``age / sqrt(cost)``. Its age is how many steps its published
version lies behind the newest step that its session has shown, as a fraction of the job's ``max_staleness``
(of :data:`NOMINAL_STALENESS` where none was declared). Why the square root: refreshing block i every T_i
seconds costs c_i / T_i of the workers and leaves a mean age proportional to T_i; the sum of ages is least,
for a given total of work, where T_i is proportional to sqrt(c_i), so where age_i / sqrt(c_i) is equal for
all. (Our own inference, not a published result.) Blocks without any version come before all others, the
cheapest first, as each is served by the diagonal method alone until then.

**Between jobs.** Steps are claimed by trainers, and one job must not starve another. So urgency decides only
between jobs that had about the same amount of work: a job that had :data:`FAIR_SECONDS` more than the least
served one that is waiting, stands back. A job that was idle starts level with the least served.

**Batches.** Small blocks travel together, since one call to a worker costs as much as a small root.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

NOMINAL_STALENESS = 200
"""Steps by which ages of jobs without a bound are measured."""

FAIR_SECONDS = 0.5
"""Seconds of work by which a job may be ahead of another that waits."""

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
    """Blocks for one call to a worker, most urgent first, and the seconds that they are thought to take."""

    blocks: tuple[tuple[SourceT, int], ...]
    seconds: float


@dataclass(slots=True, eq=False)
class _Share:
    """What one job was given of the workers."""

    served: float = 0.0
    waiting: int = 0


@dataclass(slots=True, eq=False)
class _Source:
    """A session's part of what the policy knows."""

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

    lengths: tuple[int, ...]
    nbytes: int
    alone: bool
    heap: list[tuple[int, int, int]] = field(default_factory=list)
    """(version or -1, order of arrival, block)."""


class Scheduler(Generic[SourceT]):
    """The waiting blocks of all sessions, and the order in which they are computed.

    Args:
        estimate: seconds of one worker for a block with these side lengths.
        limits: of a batch.
    """

    def __init__(self, estimate: Callable[[Iterable[int]], float], limits: BatchLimits | None = None) -> None:
        self._estimate = estimate
        self._limits = limits or BatchLimits()
        self._sources: dict[SourceT, _Source] = {}
        self._shares: dict[str, _Share] = {}
        self._users: dict[str, set[SourceT]] = {}
        self._arrivals = itertools.count()

    def __len__(self) -> int:
        """Waiting blocks."""
        return sum(share.waiting for share in self._shares.values())

    def open(self, source: SourceT, job: str, max_staleness: int) -> None:
        """Learn of a session, or of its new bound; 0 means that none was declared."""
        bound = max_staleness or NOMINAL_STALENESS
        if (known := self._sources.get(source)) is not None:
            known.bound = bound
            return
        self._sources[source] = _Source(self._shares.setdefault(job, _Share()), bound)
        self._users.setdefault(job, set()).add(source)

    def close(self, source: SourceT, job: str) -> None:
        """Forget a session and its waiting blocks."""
        known = self._sources.pop(source, None)
        if known is None:
            return
        known.share.waiting -= len(known.waiting)
        users = self._users[job]
        users.discard(source)
        if not users:
            del self._users[job], self._shares[job]

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
            share.served = max(share.served, self._least_served())
        share.waiting += 1
        known.waiting.add(block)
        group = known.groups.get((lengths, alone))
        if group is None:
            group = known.groups[lengths, alone] = _Group(lengths, nbytes, alone)
        heapq.heappush(group.heap, (-1 if version is None else version, next(self._arrivals), block))

    def next_batch(self) -> Batch[SourceT] | None:
        """Take the most urgent blocks that fit one batch; ``None`` if none waits."""
        least = self._least_served()
        heads = [
            (self._urgency(known, group), number, source, known, group)
            for number, (source, known, group) in enumerate(
                (source, known, group)
                for source, known in self._sources.items()
                if known.waiting and known.share.served <= least + FAIR_SECONDS
                for group in known.groups.values()
                if group.heap
            )
        ]
        heapq.heapify(heads)
        taken: list[tuple[SourceT, int]] = []
        seconds, nbytes = 0.0, 0
        limits = self._limits
        while heads:
            _, number, source, known, group = heads[0]
            cost = self._estimate(group.lengths)
            full = seconds + cost > limits.seconds or nbytes + group.nbytes > limits.nbytes
            if taken and (full or group.alone or len(taken) >= limits.blocks):
                break
            _, _, block = heapq.heappop(group.heap)
            known.waiting.discard(block)
            known.share.waiting -= 1
            known.share.served += cost
            taken.append((source, block))
            seconds, nbytes = seconds + cost, nbytes + group.nbytes
            if group.heap:
                heapq.heapreplace(heads, (self._urgency(known, group), number, source, known, group))
            else:
                heapq.heappop(heads)
            if group.alone:
                break
        return Batch(tuple(taken), seconds) if taken else None

    def _urgency(self, known: _Source, group: _Group) -> tuple[bool, float]:
        """Sorts the most urgent first."""
        version, _, _ = group.heap[0]
        root_cost = math.sqrt(self._estimate(group.lengths))
        return (False, root_cost) if version < 0 else (True, -known.age(version) / root_cost)

    def _least_served(self) -> float:
        """Of the jobs that have waiting blocks."""
        return min((share.served for share in self._shares.values() if share.waiting), default=0.0)
