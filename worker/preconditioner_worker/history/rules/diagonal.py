"""Rule 3: a block without a version is updated by the grafted diagonal method alone."""

from __future__ import annotations

from preconditioner_protos.history import Kind
from preconditioner_worker.history.case import Case
from preconditioner_worker.history.findings import Findings
from preconditioner_worker.history.freshness import NEVER, replay


def check_diagonal(case: Case) -> Findings:
    """Every block whose preconditioner was applied must have one."""
    findings = Findings(3, "diagonal")
    for life in case.lives:
        for event, state in replay(life):
            if event.kind is not Kind.STEP_ENDED or event.data["used"] is None:
                continue
            findings.looked_at += len(event.data["used"])
            without = [
                block
                for block in event.data["used"]
                if block >= len(state.versions) or state.versions[block] == NEVER
            ]
            if without and life.whole:
                findings.broken(f"the blocks {without} were preconditioned without a version", event)
    return findings
