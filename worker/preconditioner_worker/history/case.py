"""A history as the rules look at it: lives of trainers, lives of services."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from preconditioner_protos.history import Event, History, Kind, Scope
from preconditioner_worker.history.violation import Expectations

Key = tuple[Scope, int, int]
"""(scope, block, version)."""


def scope_of(event: Event) -> Scope:
    """Whom an event is about."""
    return Scope(event.job or "", event.rank or 0, event.epoch or 0)


def key_of(event: Event) -> Key:
    """Which snapshot or preconditioner an event is about."""
    assert event.block is not None  # by the format
    assert event.version is not None
    return scope_of(event), event.block, event.version


@dataclass(slots=True)
class Life:
    """One session of a rank, in one process.

    Attributes:
        session: its first event, with manifest and settings.
        events: all of it, in order.
        whole: no event of the process is known to be missing.
    """

    session: Event
    events: list[Event] = field(default_factory=list)
    whole: bool = True

    @property
    def scope(self) -> Scope:
        """Job, rank and epoch."""
        return scope_of(self.session)

    def setting(self, name: str) -> Any:
        """Of the session, as ``max_staleness``."""
        return self.session.data[name]

    def of(self, *kinds: Kind) -> Iterator[Event]:
        """The events of these kinds."""
        return (event for event in self.events if event.kind in kinds)


class Case:
    """What a rule is given."""

    def __init__(self, history: History, expectations: Expectations) -> None:
        self.history = history
        self.expectations = expectations

    @cached_property
    def lives(self) -> Sequence[Life]:
        """All sessions of all trainers, in the order of their beginnings."""
        lives: dict[tuple[str, Scope], Life] = {}
        for event in self.history.events:
            if not event.kind.value.startswith("trainer."):
                continue
            at = event.source, scope_of(event)
            if event.kind is Kind.TRAINER_SESSION:
                whole = self.history.sources[event.source].missing == 0
                lives[at] = Life(event, whole=whole)
            if at in lives:
                lives[at].events.append(event)
        return list(lives.values())

    @cached_property
    def services(self) -> dict[str, list[Event]]:
        """Events of each life of a service, by source."""
        services: dict[str, list[Event]] = {}
        for event in self.history.events:
            if event.kind.value.startswith("service."):
                services.setdefault(event.source, []).append(event)
        return services

    @cached_property
    def faults(self) -> list[Event]:
        """What was injected and healed, in order."""
        return [event for event in self.history.events if event.kind.value.startswith("harness.")]

    def was_stopped(self, job: str | None, begin: float, end: float) -> bool:
        """Whether somebody kept a job's process from running at some time between ``begin`` and ``end``."""
        return any(begin <= healed and injected <= end for injected, healed in self._stops.get(job, ()))

    @cached_property
    def _stops(self) -> dict[str | None, list[tuple[float, float]]]:
        stops: dict[str | None, list[tuple[float, float]]] = {}
        for event in self.faults:
            job = event.data.get("stops")
            if job is None:
                continue
            if event.kind is Kind.FAULT_INJECTED:
                stops.setdefault(job, []).append((event.at, math.inf))
            elif stops.get(job):
                stops[job][-1] = (stops[job][-1][0], event.at)
        return stops

    def of(self, *kinds: Kind) -> Iterator[Event]:
        """Events of these kinds, of all processes."""
        return (event for event in self.history.events if event.kind in kinds)

    def may_be_unwritten(self, role: str, at: float) -> bool:
        """Whether a process of this role may have done something by ``at`` that its history does not show.

        A process that was killed loses its last lines; one with holes, any of its life, which others may have
        seen a little later; and where no process of the role recorded at all, nothing can be missed.
        """
        seconds = self.expectations.unwritten_seconds
        sources = [source for source in self.history.sources.values() if source.role == role]
        return not sources or any(
            source.first <= at <= source.last + seconds
            and (source.missing > 0 or (not source.closed and at >= source.last - seconds))
            for source in sources
        )
