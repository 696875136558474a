"""What a rule reports, and what it is told of the run beside the history."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from preconditioner_protos.history import Event

_SHOWN = 4


@dataclass(frozen=True, slots=True)
class Violation:
    """A rule that was broken.

    Attributes:
        rule: its number among those that must always hold.
        check: name of the module that found it.
        message: what is wrong, with the values.
        events: that show it, oldest first.
    """

    rule: int
    check: str
    message: str
    events: tuple[Event, ...] = ()

    def __str__(self) -> str:
        shown = "; ".join(str(event) for event in self.events[:_SHOWN])
        more = f"; and {len(self.events) - _SHOWN} more" if len(self.events) > _SHOWN else ""
        return f"rule {self.rule} ({self.check}): {self.message}" + (f" [{shown}{more}]" if shown else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectations:
    """What a history is held to where the rules leave it to the run.

    Attributes:
        matrices: folder of the saved matrices; with it roots are computed again. None: digests alone.
        roots: how many adopted preconditioners are computed again at most, spread evenly over the run; None:
            all.
        step_percentile: of the durations of a process's steps (less the declared waits) that is bounded.
        step_count: least number of steps that have such a percentile.
        step_factor: the bound as a multiple of the process's median step...
        step_seconds: ...or this many seconds, whichever is more.
        longest_step: seconds that no single step may exceed, nor ``step_factor`` medians, whichever is more.
        wait_slack: seconds that a step may wait beyond ``stale_timeout``, for a loaded machine's scheduler.
        unwritten_seconds: how long before its last line a killed process may have said what is missing.
        service_rss: resident bytes that the service's process may have; None: not bounded.
        recovery_seconds: within so long after the last fault was healed every trainer that goes on training
            must adopt a version again; None: not asked for.
        killed: process ids of the trainers that were killed: every other says that it closed. None: it is
            not known which were.
    """

    matrices: Path | None = None
    roots: int | None = None
    step_percentile: float = 99.0
    step_count: int = 300
    step_factor: float = 20.0
    step_seconds: float = 0.25
    longest_step: float = 3.0
    wait_slack: float = 2.0
    unwritten_seconds: float = 10.0
    service_rss: int | None = None
    recovery_seconds: float | None = None
    killed: frozenset[int] | None = None
