"""The versions that a trainer has in use, replayed from what it adopted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from preconditioner_protos.history import Event, Kind
from preconditioner_worker.history.case import Life

NEVER = -1
"""In place of a version: none."""


@dataclass(slots=True)
class Freshness:
    """State of one life as of an event.

    Attributes:
        versions: by block, :data:`NEVER` without.
        used: blocks whose preconditioner the latest step applied.
        acted_on: blocks for which the policy is known to act (``graft`` or ``keep``), and how.
        breaker_open: no step waits.
        under_way: by block, the steps of snapshots that were taken and neither adopted nor refused.
    """

    versions: list[int]
    used: set[int] = field(default_factory=set)
    acted_on: dict[int, str] = field(default_factory=dict)
    breaker_open: bool = False
    under_way: dict[int, set[int]] = field(default_factory=dict)

    def beyond(self, step: int, bound: int) -> set[int]:
        """Blocks whose version is older than the bound."""
        return {b for b, version in enumerate(self.versions) if version != NEVER and step - version > bound}


def replay(life: Life) -> Iterator[tuple[Event, Freshness]]:
    """Every event of a life with the state as it was when the event happened, so without it."""
    state = Freshness(list(life.setting("versions")))
    for event in life.events:
        yield event, state
        _apply(state, event)


def _apply(state: Freshness, event: Event) -> None:
    block, version = event.block, event.version
    if event.kind is Kind.ADOPTED and block is not None and version is not None:
        if block < len(state.versions):
            state.versions[block] = version
        waiting = state.under_way.get(block, set())
        state.under_way[block] = {step for step in waiting if step > version}
    elif event.kind is Kind.SNAPSHOT_TAKEN and block is not None and version is not None:
        state.under_way.setdefault(block, set()).add(version)
    elif event.kind is Kind.SNAPSHOT_NACKED and block is not None and version is not None:
        state.under_way.get(block, set()).discard(version)
    elif event.kind is Kind.STEP_ENDED and event.data["used"] is not None:
        state.used = set(event.data["used"])
    elif event.kind is Kind.POLICY_ACTED:
        action = event.data["action"]
        if action in ("breaker_opened", "breaker_closed"):
            state.breaker_open = action == "breaker_opened"
        else:
            state.acted_on = dict.fromkeys(event.data["blocks"], action)
