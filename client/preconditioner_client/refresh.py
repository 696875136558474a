"""Freshness of every block: which snapshot is due, which version is in use, what happens beyond the bound.

One :class:`Refresher` serves one optimizer. It holds no tensors but those of its :class:`Schedule`; the
optimizer supplies snapshots and takes versions into use through callbacks. Everything is per block and
vectorised over blocks, so that a step costs the same for ten or ten thousand.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from preconditioner_client.config import Adoption, StalenessConfig, StalePolicy
from preconditioner_client.exchange import Arrival, Exchange, Rejection, Snapshot
from preconditioner_client.recording import TrainerHistory
from preconditioner_client.schedule import NEVER, Mask, Schedule, Steps

logger = logging.getLogger("preconditioner_client")

_KEPT_AGES = 4096


class Refresher:
    """Bookkeeping of snapshots and versions for a fixed list of blocks.

    Args:
        staleness: the bound, the intervals and the policy.
        costs: relative size of each block's snapshot, to spread snapshots over the interval.
        take: makes snapshots at a step, of those of the given blocks that have statistics.
        adopt: takes arrivals into use; called from within :meth:`settle` only.
    """

    def __init__(
        self,
        staleness: StalenessConfig,
        costs: Sequence[float],
        take: Callable[[Sequence[int], int], list[Snapshot]],
        adopt: Callable[[Sequence[Arrival]], None],
    ) -> None:
        self.config = staleness
        self.history: TrainerHistory | None = None
        # Empty but for scheduled adoption.
        self.schedule = Schedule(staleness.delay or 0, staleness.snapshots_in_flight)
        self._take = take
        self._adopt = adopt
        self.versions: Steps = np.empty(0, dtype=np.int64)
        # Least number of steps between two snapshots of each block; may be changed at any time.
        self.intervals: Steps = np.empty(0, dtype=np.int64)
        self._outstanding: Steps = np.empty(0, dtype=np.int64)
        self._last_snapshot: Steps = np.empty(0, dtype=np.int64)
        # A block whose last snapshot was refused is not waited for: the next statistics may do.
        self._refused: Mask = np.empty(0, dtype=np.bool_)
        # Step of the first adoption, from which a block's direction may be blended in.
        self.first_adopted: Steps = np.empty(0, dtype=np.int64)
        self.extend(costs, 0)
        self._generation = 0
        self._breaker_open = False
        self._warned: set[str] = set()
        self.ages: deque[int] = deque(maxlen=_KEPT_AGES)
        self.counters = dict.fromkeys(
            (
                "versions_adopted",
                "outdated",
                "refused",
                "age_max",
                "waits",
                "wait_timeouts",
                "late_adoptions",
                "blocks_grafted_stale",
                "blocks_kept_stale",
            ),
            0,
        )
        self.wait_seconds = 0.0

    def extend(self, costs: Sequence[float], step: int, own: Sequence[int] | None = None) -> None:
        """Add blocks at the end, as of step ``step``.

        Args:
            costs: relative size of each snapshot.
            step: the latest step.
            own: the positions in ``costs`` of the blocks to add, where other ranks hold the rest: a block is
                due in the same steps whoever holds it. None: all.
        """
        phases = self._phases(costs)
        if own is not None:
            phases = phases[np.asarray(own, dtype=np.int64)]
        count = len(phases)
        never: Steps = np.full(count, NEVER, dtype=np.int64)
        begin: Steps = phases - self.config.interval + step
        self.versions = np.concatenate([self.versions, never])
        self.intervals = np.concatenate([self.intervals, np.full(count, self.config.interval)])
        self._outstanding = np.concatenate([self._outstanding, never])
        self.schedule.extend(count)
        self.first_adopted = np.concatenate([self.first_adopted, never])
        self._last_snapshot = np.concatenate([self._last_snapshot, begin])
        self._refused = np.concatenate([self._refused, np.zeros(count, dtype=np.bool_)])

    def _phases(self, costs: Sequence[float]) -> Steps:
        """First snapshots spread over one interval in proportion to size, so that no step bears them all."""
        interval = self.config.interval
        if not self.config.stagger or not costs:
            return np.full(len(costs), interval, dtype=np.int64)
        before = np.concatenate([[0.0], np.cumsum(np.asarray(costs, dtype=np.float64))])
        first: Steps = interval + np.floor(before[:-1] / before[-1] * interval).astype(np.int64)
        return first

    def offer(self, exchange: Exchange, step: int) -> None:
        """Take the snapshots that are due after step ``step`` and hand them over. Never blocks."""
        if exchange.generation != self._generation:
            self._reoffer(exchange, step)
        due = step - self._last_snapshot >= self.intervals
        if self.config.refresh_every is None:
            idle = self._outstanding == NEVER
            # An answer that never comes must not silence a block for ever.
            lost = step - self._outstanding > np.maximum(self.intervals, self.config.max_staleness // 2)
            due &= idle | lost
        self._offer_blocks(exchange, np.flatnonzero(due), step)

    def settle(self, exchange: Exchange, step: int) -> Mask:
        """Adopt what is there, and apply the policy to blocks beyond the bound.

        Returns:
            For each block whether its preconditioner may be used in this step.
        """
        self._collect(exchange, step)
        late = self._late(step)
        if late.any() and self.config.policy is StalePolicy.WAIT and not self._breaker_open:
            self._wait(exchange, step, late)
            late = self._late(step)
        usable: Mask = self.versions != NEVER
        beyond = usable & (step - self.versions > self.config.max_staleness)
        if beyond.any():
            if self.config.policy is StalePolicy.KEEP:
                self.counters["blocks_kept_stale"] += int(beyond.sum())
                self._warn("stale", "preconditioners older than the bound stay in use")
            else:
                usable &= ~beyond
                self.counters["blocks_grafted_stale"] += int(beyond.sum())
                self._warn("stale", "blocks beyond the bound take the grafted diagonal step")
        else:
            self._warned.discard("stale")
        if self.history is not None:
            action = "keep" if self.config.policy is StalePolicy.KEEP else "graft"
            self.history.acted(step, action, beyond)
        if usable.any():
            age = step - int(self.versions[usable].min())
            self.counters["age_max"] = max(self.counters["age_max"], age)
        return usable

    def age(self, step: int) -> int | None:
        """Largest age of any block's version at a step; None without versions."""
        known = self.versions[self.versions != NEVER]
        return int(step - known.min()) if known.size else None

    def metrics(self) -> dict[str, Any]:
        """Plain counters, see ``Shampoo.metrics``."""
        return {
            **self.counters,
            "ages": list(self.ages),
            "blocks": int(self.versions.size),
            "blocks_with_version": int((self.versions != NEVER).sum()),
            "wait_seconds": self.wait_seconds,
            "breaker_open": self._breaker_open,
        }

    def restore(
        self, versions: Sequence[int], first_adopted: Sequence[int], last_snapshots: Sequence[int]
    ) -> None:
        """Continue from a checkpoint: versions in use, since when, and when each block was last taken."""
        self.versions[:] = versions
        self.first_adopted[:] = first_adopted
        self._last_snapshot[:] = last_snapshots
        self._outstanding[:] = NEVER
        self._refused[:] = False
        self.schedule.forget_arrivals()
        for block, step in self.schedule.newest().items():
            self._outstanding[block] = step

    def last_snapshot(self, block: int) -> int:
        """Step of the newest snapshot of a block; before the first, where its schedule begins."""
        return int(self._last_snapshot[block])

    def _offer_blocks(self, exchange: Exchange, blocks: Steps, step: int) -> None:
        if not blocks.size:
            return
        snapshots = self._take([int(b) for b in blocks], step)
        self._last_snapshot[blocks] = step
        if not snapshots:
            return
        self._outstanding[[snapshot.block for snapshot in snapshots]] = step
        if self.history is not None:
            self.history.taken(snapshots)
        if self.config.adoption is Adoption.SCHEDULED:
            for snapshot in snapshots:
                self.schedule.add(snapshot)
        exchange.offer(snapshots, step)

    def _reoffer(self, exchange: Exchange, step: int) -> None:
        """A connection was made anew, so what was under way may be lost.

        On a schedule the very snapshots under way are needed again; otherwise newer ones are worth more.
        """
        self._generation = exchange.generation
        if self.config.adoption is Adoption.SCHEDULED:
            missing = self.schedule.missing()
            if missing:
                exchange.offer(missing, step)
            return
        self._outstanding[:] = NEVER

    def _collect(self, exchange: Exchange, step: int) -> None:
        adopted: dict[int, Arrival] = {}
        for event in exchange.collect(step):
            if isinstance(event, Rejection):
                self._reject(event)
            elif event.step <= self.versions[event.block] or event.step > step:
                self.counters["outdated"] += 1
            elif self.config.adoption is Adoption.SCHEDULED:
                self.schedule.arrived(event)
            else:
                previous = adopted.get(event.block)
                if previous is not None and previous.step >= event.step:
                    self.counters["outdated"] += 1
                    continue
                adopted[event.block] = event
        due, overdue = self.schedule.due(step)
        self.counters["late_adoptions"] += overdue
        for arrival in due:
            adopted[arrival.block] = arrival
        if not adopted:
            return
        self._adopt(list(adopted.values()))
        if self.history is not None:
            self.history.adopted(adopted.values(), step)
        for arrival in adopted.values():
            block = arrival.block
            self.versions[block] = arrival.step
            if self.first_adopted[block] == NEVER:
                self.first_adopted[block] = step
            self._refused[block] = False
            if self._outstanding[block] <= arrival.step:
                self._outstanding[block] = NEVER
            self.ages.append(step - arrival.step)
        self.counters["versions_adopted"] += len(adopted)
        if self._breaker_open:
            self._breaker_open = False
            if self.history is not None:
                self.history.breaker(step, opened=False)
            logger.warning("step %d: preconditioners arrive again; steps may wait for them again", step)

    def _reject(self, event: Rejection) -> None:
        self.counters["refused"] += 1
        block = event.block
        self._refused[block] = True
        self.schedule.drop(block, [event.step])
        if self._outstanding[block] <= event.step:
            self._outstanding[block] = NEVER
        self._warn(event.reason, f"no preconditioner for block {block}: {event.reason}: {event.detail}")

    def _late(self, step: int) -> Mask:
        """Blocks that a step under ``wait`` waits for."""
        if self.config.adoption is Adoption.SCHEDULED:
            # Nothing is adopted before it is due: however old what is in use may be, as after refusals, which
            # no checkpoint tells of, waiting would bring nothing else.
            return self.schedule.overdue(step)
        late: Mask = (self.versions != NEVER) & (step - self.versions > self.config.max_staleness)
        late &= ~self._refused
        return late

    def _wait(self, exchange: Exchange, step: int, late: Mask) -> None:
        began = time.monotonic()
        deadline = began + self.config.stale_timeout
        self.counters["waits"] += 1
        if self.history is not None:
            self.history.wait_begun(step, late)
        try:
            self._wait_for(exchange, step, late, deadline)
        finally:
            waited = time.monotonic() - began
            self.wait_seconds += waited
            if self.history is not None:
                self.history.wait_ended(step, waited, timed_out=self._breaker_open)
        if self.history is not None and self._breaker_open:
            self.history.breaker(step, opened=True)

    def _wait_for(self, exchange: Exchange, step: int, late: Mask, deadline: float) -> None:
        while late.any():
            if exchange.generation != self._generation:
                self._reoffer(exchange, step)
            if self.config.adoption is Adoption.EAGER:
                unasked = late & (self._outstanding == NEVER)
                self._offer_blocks(exchange, np.flatnonzero(unasked), step)
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not exchange.wait(remaining):
                self._breaker_open = True
                self.counters["wait_timeouts"] += 1
                what = f"are older than {self.config.max_staleness} steps"
                if self.config.adoption is Adoption.SCHEDULED:
                    what = f"lack the preconditioner that is due {self.config.delay} steps after its snapshot"
                logger.warning(
                    "step %d: %d blocks %s and nothing came within %.1f s; training goes on with the "
                    "preconditioners that are no older than %d steps, elsewhere with the grafted diagonal "
                    "step, and waits no more until preconditioners arrive",
                    step,
                    int(late.sum()),
                    what,
                    self.config.stale_timeout,
                    self.config.max_staleness,
                )
                break
            self._collect(exchange, step)
            late = self._late(step)

    def _warn(self, state: str, message: str) -> None:
        """Log a state once, until it has ended."""
        if state not in self._warned:
            self._warned.add(state)
            logger.warning("%s (max_staleness %d)", message, self.config.max_staleness)
