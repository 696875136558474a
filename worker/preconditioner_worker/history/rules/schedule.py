"""Rule 10: a scheduled version is adopted exactly ``delay`` steps after its snapshot, or later after a wait."""

from __future__ import annotations

from preconditioner_protos.history import Event, Kind
from preconditioner_worker.history.case import Case
from preconditioner_worker.history.findings import Findings


def check_schedule(case: Case) -> Findings:
    """Every adoption under a schedule."""
    findings = Findings(10, "schedule")
    for life in case.lives:
        delay = life.setting("delay")
        if delay is None:
            continue
        # A late one is in order where a step waited for it in vain, or no step waits by policy or breaker.
        excused: Event | None = None
        waits = life.setting("policy") == "wait"
        for event in life.events:
            if event.kind is Kind.WAIT_ENDED and event.data["timed_out"]:
                excused = event
            if event.kind is not Kind.ADOPTED:
                continue
            assert event.version is not None  # by the format
            assert event.step is not None
            findings.looked_at += 1
            due = event.version + delay
            if event.step < due:
                findings.broken(f"version {event.version} was adopted before step {due}", event)
            elif event.step > due and waits and excused is None and due > (life.session.step or 0):
                findings.broken(
                    f"version {event.version} was adopted after step {due}, and no wait failed", event
                )
    return findings
