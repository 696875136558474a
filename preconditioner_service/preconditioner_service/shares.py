"""A job's share of the workers: its weight, what it was given, and what holds it back.

Pure arithmetic: the time is handed in. One share lasts as long as the service remembers the job, so that
closing its sessions and opening new ones wins nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Hold:
    """Why a job's next block is not computed now although one waits.

    Attributes:
        until: monotonic seconds; infinite if something in flight must end first.
        why: value, limit and setting, for people.
    """

    until: float
    why: str


class Share:
    """What one job may take of the workers, over all of its sessions. Compared by identity.

    Attributes:
        name: of the job.
        weight: of the job, > 0: busy jobs are given work in proportion to it.
        max_in_flight_seconds: estimated seconds of one worker that may be in flight; one block always may.
        max_refresh_rate: blocks a second. The bucket holds one of every block of the job, or one second's.
        blocks: of the job's sessions.
        virtual: seconds of work that it was given, divided by its weight, plus those that passed it by while
            it had none to give; see :mod:`preconditioner_service.scheduler`.
    """

    __slots__ = (
        "_in_flight",
        "_running",
        "_tokens",
        "_tokens_at",
        "blocks",
        "max_in_flight_seconds",
        "max_refresh_rate",
        "name",
        "virtual",
        "weight",
    )

    def __init__(
        self,
        name: str,
        weight: float = 1.0,
        max_in_flight_seconds: float = math.inf,
        max_refresh_rate: float = math.inf,
    ) -> None:
        self.name = name
        self.weight = weight
        self.max_in_flight_seconds = max_in_flight_seconds
        self.max_refresh_rate = max_refresh_rate
        self.blocks = 0
        self.virtual = 0.0
        self._in_flight = 0.0
        self._running = 0
        self._tokens = math.inf
        self._tokens_at = 0.0

    def hold(self, now: float, cost: float) -> Hold | None:
        """What keeps a block of estimated ``cost`` seconds from being taken now; ``None`` if nothing does."""
        if self._running and self._in_flight + cost > self.max_in_flight_seconds:
            return Hold(
                math.inf,
                f"{self._in_flight:.3g} s of work are in flight and the next block takes {cost:.3g} s, "
                f"allowed are {self.max_in_flight_seconds:g} s (max_in_flight_seconds)",
            )
        self._refill(now)
        if self._tokens < 1:
            wait = (1 - self._tokens) / self.max_refresh_rate
            return Hold(
                now + wait,
                f"the next refresh may begin in {wait:.3g} s, allowed are {self.max_refresh_rate:g} a second "
                "(max_refresh_rate)",
            )
        return None

    def take(self, cost: float) -> None:
        """Count a block that is taken to be computed; :meth:`hold` allowed it."""
        self._in_flight += cost
        self._running += 1
        self._tokens -= 1
        self.virtual += cost / self.weight

    def done(self, cost: float, seconds: float | None = None) -> None:
        """Count its end.

        Args:
            cost: as it was taken.
            seconds: what it took, where known; the share is charged for the difference.
        """
        self._running -= 1
        self._in_flight = self._in_flight - cost if self._running else 0.0
        if seconds is not None:
            self.virtual += (seconds - cost) / self.weight

    def _refill(self, now: float) -> None:
        if math.isinf(self.max_refresh_rate):
            self._tokens = math.inf
            return
        most = max(self.max_refresh_rate, float(self.blocks), 1.0)
        grown = self._tokens + (now - self._tokens_at) * self.max_refresh_rate
        self._tokens, self._tokens_at = min(grown, most), now
