"""After the last fault versions arrive again; judged only where the run says within what time."""

from __future__ import annotations

from preconditioner_protos.history import Kind
from preconditioner_worker.history.case import Case
from preconditioner_worker.history.findings import Findings


def check_recovery(case: Case) -> Findings:
    """The newest life of every job, from the last healed fault on."""
    findings = Findings(2, "recovery")
    allowed = case.expectations.recovery_seconds
    if allowed is None:
        return findings
    healed = max((event.at for event in case.faults), default=0.0)
    # By epochs: a process that was replaced before it announced its session may do so after its successor.
    by_epoch = sorted(case.lives, key=lambda life: life.session.epoch or 0)
    newest = {(life.session.job, life.session.rank): life for life in by_epoch}
    for life in newest.values():
        begin = max(healed, life.session.at)
        last = max(event.at for event in life.events)
        if not life.setting("blocks"):
            continue
        first = next((event.at for event in life.of(Kind.ADOPTED) if event.at >= begin), None)
        if first is None and last < begin + allowed:
            continue  # it ended before its time was over
        findings.looked_at += 1
        if first is None or first > begin + allowed:
            took = "no version" if first is None else f"the first version after {first - begin:.1f} s"
            findings.broken(
                f"{took} of job {life.session.job} since all is healed; {allowed:g} s are allowed",
                life.session,
            )
    return findings
