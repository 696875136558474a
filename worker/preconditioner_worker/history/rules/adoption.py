"""Rule 4: what is adopted arrived whole, and is newer than the last of its block in the epoch."""

from __future__ import annotations

from preconditioner_protos.history import Event, Kind
from preconditioner_worker.history.case import Case, Key, key_of
from preconditioner_worker.history.findings import Findings
from preconditioner_worker.history.freshness import replay


def check_adoption(case: Case) -> Findings:
    """Every adoption, against what was in use and what arrived."""
    findings = Findings(4, "adoption")
    for life in case.lives:
        received: dict[Key, Event] = {}
        for event, state in replay(life):
            if event.kind is Kind.RECEIVED:
                received[key_of(event)] = event
            if event.kind is not Kind.ADOPTED:
                continue
            assert event.block is not None  # by the format
            assert event.version is not None
            assert event.step is not None
            findings.looked_at += 1
            blocks = len(state.versions)
            if event.block >= blocks:
                findings.broken(f"block {event.block} was adopted, the session has {blocks}", event)
                continue
            if event.version <= state.versions[event.block]:
                findings.broken(
                    f"version {event.version} of block {event.block} was adopted after version "
                    f"{state.versions[event.block]} of the same epoch",
                    event,
                )
            if event.version > event.step:
                findings.broken(f"version {event.version} was adopted in step {event.step}", event)
            arrival = received.get(key_of(event))
            if arrival is None:
                if life.whole:
                    findings.broken("a version was adopted that never arrived in this epoch", event)
            elif event.data["digests"] and arrival.data["digests"] not in (None, event.data["digests"]):
                findings.broken("another matrix was adopted than arrived", arrival, event)
    return findings
