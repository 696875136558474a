"""Rule 6: bytes held on either side stay within their budgets."""

from __future__ import annotations

from preconditioner_protos.history import Kind
from preconditioner_worker.history.case import Case
from preconditioner_worker.history.findings import Findings


def check_memory(case: Case) -> Findings:
    """Every look at what is held."""
    findings = Findings(6, "memory")
    most = case.expectations.service_rss
    for event in case.of(Kind.TRAINER_HELD, Kind.SERVICE_HELD):
        findings.looked_at += 1
        held = event.data
        if event.kind is Kind.TRAINER_HELD:
            bounded = [
                (name, held[name], held[f"{name}_budget"]) for name in ("waiting", "unanswered", "inbox")
            ]
        else:
            bounded = [("service", held["held"], held["budget"])]
            bounded += [(f"job {job} rank {rank}", has, may) for job, rank, has, may in held["sessions"]]
            if most is not None:
                bounded.append(("resident memory", held["rss"], most))
        for what, has, may in bounded:
            if has > may:
                findings.broken(f"{what}: {has} bytes are held, the budget is {may}", event)
    return findings
