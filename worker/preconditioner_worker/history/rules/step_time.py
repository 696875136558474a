"""Rule 1: no step takes long for anything but a declared wait."""

from __future__ import annotations

import numpy as np

from preconditioner_protos.history import Event, Kind
from preconditioner_worker.history.case import Case
from preconditioner_worker.history.findings import Findings


def check_step_time(case: Case) -> Findings:
    """The stated percentile of a process's steps, less the waits, against its median step.

    A percentile, since a shared machine now and then takes a process off its core for longer than any step.
    """
    findings = Findings(1, "step_time")
    expected = case.expectations
    steps: dict[tuple[str, str | None], list[Event]] = {}
    for event in case.of(Kind.STEP_ENDED):
        if case.was_stopped(event.job, event.at - event.data["seconds"], event.at):
            continue
        steps.setdefault((event.source, event.job), []).append(event)
    for (_, job), events in steps.items():
        findings.looked_at += len(events)
        seconds = np.array([event.data["seconds"] - event.data["waited"] for event in events])
        median, high = np.percentile(seconds, [50, expected.step_percentile])
        bound = max(expected.step_factor * median, expected.step_seconds)
        if high > bound:
            slowest = sorted(zip(seconds.tolist(), range(len(events)), strict=True), reverse=True)[:3]
            findings.broken(
                f"the {expected.step_percentile:g}th percentile of {len(events)} steps of job {job} is "
                f"{high:.3f} s, the median {median:.3f} s; the bound is {bound:.3f} s",
                *(events[number] for _, number in slowest),
            )
    return findings
