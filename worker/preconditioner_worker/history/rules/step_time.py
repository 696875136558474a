"""Rule 1: no step takes long for anything but a declared wait."""

from __future__ import annotations

import numpy as np

from preconditioner_protos.history import Event, Kind
from preconditioner_worker.history.case import Case
from preconditioner_worker.history.findings import Findings


def check_step_time(case: Case) -> Findings:
    """A process's steps, less the waits: each of them, and a percentile against the median step.

    A shared machine now and then takes a process off its core for longer than any step, so the tight bound is
    that of a percentile, of a few hundred steps at least; the wide one is for all, since one stall per fault
    is in no percentile of a long life. Steps of a process that somebody had stopped are not looked at.
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
        slowest = np.argsort(-seconds)
        median, high = np.percentile(seconds, [50, expected.step_percentile])
        ceiling = max(expected.step_factor * median, expected.longest_step)
        bound = max(expected.step_factor * median, expected.step_seconds)
        if seconds.max() > ceiling:
            findings.broken(
                f"{np.count_nonzero(seconds > ceiling)} of {len(events)} steps of job {job} took longer than "
                f"{ceiling:.3f} s, the longest {seconds.max():.3f} s",
                *(events[number] for number in slowest if seconds[number] > ceiling),
            )
        if len(events) >= expected.step_count and high > bound:
            findings.broken(
                f"the {expected.step_percentile:g}th percentile of {len(events)} steps of job {job} is "
                f"{high:.3f} s, the median {median:.3f} s; the bound is {bound:.3f} s",
                *(events[number] for number in slowest[:3]),
            )
    return findings
