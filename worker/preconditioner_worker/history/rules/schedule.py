"""Rule 10: a scheduled version is adopted ``delay`` steps after its snapshot, late only after a wait."""

from __future__ import annotations

import math

from preconditioner_protos.history import Kind
from preconditioner_worker.history.case import Case
from preconditioner_worker.history.findings import Findings


def check_schedule(case: Case) -> Findings:
    """Every adoption under a schedule."""
    findings = Findings(10, "schedule")
    for life in case.lives:
        delay = life.setting("delay")
        if delay is None:
            continue
        # A late one is in order where no step waits for it: by policy, after a wait in vain, or since its
        # snapshot was taken before this process began.
        waits = life.setting("policy") == "wait"
        in_vain: list[tuple[float, float]] = []
        for event in life.events:
            if event.kind is Kind.POLICY_ACTED and event.step is not None:
                if event.data["action"] == "breaker_opened":
                    in_vain.append((event.step, math.inf))
                elif event.data["action"] == "breaker_closed" and in_vain:
                    in_vain[-1] = (in_vain[-1][0], event.step)
            if event.kind is not Kind.ADOPTED:
                continue
            assert event.version is not None  # by the format
            assert event.step is not None
            findings.looked_at += 1
            due = event.version + delay
            resumed = due <= (life.session.step or 0)
            excused = resumed or not waits or any(begin <= due <= end for begin, end in in_vain)
            if event.step < due:
                findings.broken(f"version {event.version} was adopted before step {due}", event)
            elif event.step > due and not excused:
                findings.broken(f"version {event.version} was adopted after step {due} without a wait", event)
    return findings
