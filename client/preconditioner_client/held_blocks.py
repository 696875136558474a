"""The blocks of this rank by their index in its session: snapshots from their stacks, versions into them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from preconditioner_client.exchange import Arrival, Snapshot
from preconditioner_client.plan import GroupPlan, StackPlan


class HeldBlocks:
    """Which stack holds which block of the session."""

    def __init__(self) -> None:
        self._entries: list[StackPlan] = []

    def __len__(self) -> int:
        return len(self._entries)

    def extend(self, plan: GroupPlan) -> None:
        """Add the blocks of another group."""
        for entry in plan.stacks:
            self._entries.extend([entry] * len(entry.stack))

    def devices(self) -> list[torch.device]:
        """Where each block is."""
        return [entry.stack.device for entry in self._entries]

    def snapshots(self, blocks: Sequence[int], step: int) -> list[Snapshot]:
        """Snapshots after a step, of those of the given blocks that have statistics."""
        snapshots = []
        for entry, positions in self._by_stack(blocks):
            rows = [blocks[i] - entry.first for i in positions]
            # A frozen block has no statistics, whose root would be the identity, and no preconditioner.
            rows = [row for row in rows if entry.stack.updates[row]]
            if not rows:
                continue
            taken = entry.stack.snapshot(rows)
            for row, sides in zip(rows, taken.sides, strict=True):
                snapshots.append(Snapshot(entry.first + row, step, sides, taken.ready))
        return snapshots

    def adopt(self, arrivals: Sequence[Arrival]) -> None:
        """Take new preconditioners into use."""
        for entry, positions in self._by_stack([arrival.block for arrival in arrivals]):
            chosen = [arrivals[i] for i in positions]
            entry.stack.adopt([a.block - entry.first for a in chosen], [a.sides for a in chosen])

    def _by_stack(self, blocks: Sequence[int]) -> list[tuple[StackPlan, list[int]]]:
        """Positions in ``blocks``, grouped by the stack that holds them."""
        grouped: dict[int, list[int]] = {}
        for position, block in enumerate(blocks):
            grouped.setdefault(self._entries[block].first, []).append(position)
        return [(self._entries[first], positions) for first, positions in grouped.items()]
