"""Blocks on which workers die again and again are set aside, so that they do not cost the others theirs.

A worker that dies takes its batch with it and comes back after seconds. A matrix that kills every worker it
meets (for want of memory, or by a fault in a library) would so take a share of the pool for itself. Pure
bookkeeping; who is told what is the dispatcher's business.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from preconditioner_service.sessions import BlockState


@dataclass(frozen=True, kw_only=True)
class QuarantineLimits:
    """When a block is set aside, and for how long.

    Attributes:
        after: workers that must die on it in a row.
        seconds: until one of its snapshots is tried again; if that kills its worker too, from anew.
    """

    after: int = 3
    seconds: float = 300.0


class Quarantine:
    """Decides which blocks are set aside. A new session, as of a new epoch, begins with none.

    Args:
        limits: when and for how long.
        clock: monotonic seconds.
    """

    def __init__(
        self, limits: QuarantineLimits | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.limits = limits or QuarantineLimits()
        self._clock = clock

    def holds(self, block: BlockState) -> bool:
        """Whether the block's snapshots must not be computed now."""
        return block.quarantined_until is not None and self._clock() < block.quarantined_until

    def lost(self, block: BlockState, *, shared: bool) -> bool:
        """A worker died on this block, or on a batch that it shared; whether it is set aside from now on."""
        block.losses += 1
        if shared:
            return False  # which of them it was shows when each travels alone
        # One that was set aside before has one try, not the whole budget.
        if block.losses < self.limits.after and block.quarantined_until is None:
            return False
        block.quarantined_until = self._clock() + self.limits.seconds
        return True
