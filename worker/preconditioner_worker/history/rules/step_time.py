"""Rule 1: no step takes long for anything but a declared wait."""

from __future__ import annotations

import numpy as np

from preconditioner_protos.history import Event, Kind
from preconditioner_worker.history.case import Case, Life
from preconditioner_worker.history.findings import Findings


def check_step_time(case: Case) -> Findings:
    """A process's steps, less the waits: each of them, and a percentile against the median step.

    A shared machine now and then takes a process off its core for longer than any step, so the tight bound is
    that of a percentile, of a few hundred steps at least; the wide one is for all, since one stall per fault
    is in no percentile of a long life. Steps of a process that somebody had stopped are not looked at.
    A step that never ends breaks the rule, too.
    """
    findings = Findings(1, "step_time")
    expected = case.expectations
    steps: dict[tuple[str, str | None], list[Event]] = {}
    for event in case.of(Kind.STEP_ENDED):
        if case.was_stopped(event.job, event.at - event.data["seconds"], event.at):
            continue
        steps.setdefault((event.source, event.job), []).append(event)
    ceilings: dict[str, float] = {}
    for (source, job), events in steps.items():
        findings.looked_at += len(events)
        seconds = np.array([event.data["seconds"] - event.data["waited"] for event in events])
        slowest = np.argsort(-seconds)
        median, high = np.percentile(seconds, [50, expected.step_percentile])
        ceiling = max(expected.step_factor * median, expected.longest_step)
        ceilings[source] = ceiling
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
    for life in case.lives:
        # The end of a step may stand in a hole.
        if life.whole:
            ceiling = ceilings.get(life.session.source, expected.longest_step)
            _find_hung(case, findings, life, ceiling)
    return findings


def _find_hung(case: Case, findings: Findings, life: Life, ceiling: float) -> None:
    """Steps that began and did not end, though their process lived on for longer than a step may take.

    One that was killed in the middle of a step says nothing any more.
    """
    source = case.history.sources[life.session.source]
    unended: dict[int | None, Event] = {}
    waiting = 0.0
    for event in life.events:
        if event.kind is Kind.STEP_BEGUN:
            unended[event.step] = event
            waiting = 0.0
        elif event.kind is Kind.STEP_ENDED:
            unended.pop(event.step, None)
        elif event.kind is Kind.WAIT_BEGUN:
            waiting = life.setting("stale_timeout") + case.expectations.wait_slack
        elif event.kind is Kind.WAIT_ENDED:
            waiting = event.data["seconds"]
    newest = max((step or 0 for step in unended), default=0)
    for step, begun in unended.items():
        # Only a life's last step can still be waiting.
        may_take = ceiling + (waiting if step == newest else 0.0)
        if case.was_stopped(begun.job, begun.at, source.last):
            continue
        if source.closed or source.last - begun.at > may_take:
            said = "its process closed" if source.closed else "the last that its process said came"
            findings.broken(
                f"step {step} of job {begun.job} began and did not end; {said} {source.last - begun.at:.3f} "
                f"s later, {may_take:.3f} s are allowed",
                begun,
            )
