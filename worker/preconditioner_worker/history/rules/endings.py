"""Rule 1: a trainer does not fall silent, as one does that hangs for good; judged where kills are known."""

from __future__ import annotations

from preconditioner_protos.history import Kind
from preconditioner_worker.history.case import Case
from preconditioner_worker.history.findings import Findings


def check_endings(case: Case) -> Findings:
    """Every process of a trainer that nobody killed, which must have said that it closed."""
    findings = Findings(1, "endings")
    killed = case.expectations.killed
    if killed is None:
        return findings
    for event in case.of(Kind.RECORDER_OPENED):
        if event.data["role"] != "trainer" or event.data["pid"] in killed:
            continue
        findings.looked_at += 1
        source = case.history.sources[event.source]
        # Its end may be among the events that were lost.
        if not source.closed and source.missing == 0:
            findings.broken(
                f"process {event.data['pid']} fell silent after {source.last - event.at:.1f} s: nobody "
                "killed it, and it did not close",
                event,
            )
    return findings
