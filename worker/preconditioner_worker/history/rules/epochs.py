"""Rule 4 across lives: a trainer that starts or resumes opens a larger epoch than any before."""

from __future__ import annotations

from preconditioner_protos.history import Event, Kind
from preconditioner_worker.history.case import Case
from preconditioner_worker.history.findings import Findings
from preconditioner_worker.history.freshness import NEVER


def check_epochs(case: Case) -> Findings:
    """Every session of a trainer, and what it begins with."""
    findings = Findings(4, "epochs")
    sessions: list[Event] = []
    for event in case.of(Kind.TRAINER_SESSION):
        findings.looked_at += 1
        assert event.epoch is not None  # by the format
        assert event.step is not None
        # A process chooses its epoch when it begins, and may announce it much later.
        begin = case.history.sources[event.source].first
        known = [
            other
            for other in sessions
            if (other.job, other.rank) == (event.job, event.rank)
            and (other.source == event.source or other.at < begin)
        ]
        before = max(known, key=lambda other: other.epoch or 0, default=None)
        if before is not None and event.epoch <= (before.epoch or 0):
            findings.broken(f"epoch {event.epoch} was opened after epoch {before.epoch}", before, event)
        sessions.append(event)
        blocks, versions = event.data["blocks"], event.data["versions"]
        ahead = [b for b, v in enumerate(versions) if v != NEVER and v > event.step]
        if len(versions) != len(blocks):
            findings.broken(f"{len(versions)} versions of {len(blocks)} blocks", event)
        if ahead:
            findings.broken(f"step {event.step} is resumed with newer versions of the blocks {ahead}", event)
    return findings
