"""What scheduled adoption has under way of every block, and what has arrived before its step."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from preconditioner_client.exchange import Arrival, Snapshot

NEVER = -1
"""In place of a step."""

Steps = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


class Schedule:
    """Snapshots whose versions are adopted exactly ``delay`` steps later.

    Args:
        delay: in steps.
        depth: snapshots of one block that are under way at once. What is more is overdue, and waited for no
            more: a service that is gone must not cost memory.
    """

    def __init__(self, delay: int, depth: int) -> None:
        self._delay = delay
        self._depth = depth
        self._snapshots: dict[int, dict[int, Snapshot]] = {}
        """Of each block, by step, oldest first."""
        self._early: dict[int, dict[tuple[int, int], Arrival]] = {}
        """By the step of their adoption."""
        self._oldest: Steps = np.empty(0, dtype=np.int64)

    def extend(self, count: int) -> None:
        """Add blocks at the end."""
        self._oldest = np.concatenate([self._oldest, np.full(count, NEVER, dtype=np.int64)])

    def add(self, snapshot: Snapshot) -> None:
        """Wait for the version of a snapshot, the newest of its block."""
        of_block = self._snapshots.setdefault(snapshot.block, {})
        of_block[snapshot.step] = snapshot
        if len(of_block) > self._depth:
            del of_block[next(iter(of_block))]
        self._oldest[snapshot.block] = next(iter(of_block))

    def under_way(self, block: int) -> list[Snapshot]:
        """The snapshots of a block that are waited for, oldest first."""
        return list(self._snapshots.get(block, {}).values())

    def missing(self) -> list[Snapshot]:
        """Those whose versions have not arrived."""
        here = {key for arrivals in self._early.values() for key in arrivals}
        return [
            snapshot
            for block in sorted(self._snapshots)
            for step, snapshot in self._snapshots[block].items()
            if (block, step) not in here
        ]

    def overdue(self, step: int) -> Mask:
        """Blocks with a version that should have been adopted by a step."""
        late: Mask = (self._oldest != NEVER) & (self._oldest + self._delay <= step)
        return late

    def arrived(self, arrival: Arrival) -> None:
        """Keep a version until its step."""
        adoption = arrival.step + self._delay
        self._early.setdefault(adoption, {})[arrival.block, arrival.step] = arrival

    def due(self, step: int) -> tuple[list[Arrival], int]:
        """Versions whose step of adoption has come, oldest first, and how many of them are late."""
        due: list[Arrival] = []
        late = 0
        for adoption in sorted(adoption for adoption in self._early if adoption <= step):
            arrivals = self._early.pop(adoption).values()
            late += len(arrivals) * (adoption < step)
            due += arrivals
            for arrival in arrivals:
                # An older snapshot of the block is of no use any more.
                passed = [s.step for s in self.under_way(arrival.block) if s.step <= arrival.step]
                self.drop(arrival.block, passed)
        return due, late

    def drop(self, block: int, steps: Iterable[int]) -> None:
        """Wait no more for these snapshots of a block."""
        of_block = self._snapshots.get(block, {})
        for step in steps:
            of_block.pop(step, None)
        self._oldest[block] = next(iter(of_block), NEVER)

    def newest(self) -> dict[int, int]:
        """The newest step that is waited for, of each block that has one."""
        return {block: max(of_block) for block, of_block in self._snapshots.items() if of_block}

    def forget_arrivals(self) -> None:
        """Those of another life."""
        self._early.clear()

    def clear(self) -> None:
        """Wait for nothing."""
        self._snapshots.clear()
        self._oldest[:] = NEVER
