"""Rule 9: nothing crosses between jobs, ranks or epochs, and a fenced epoch stays out."""

from __future__ import annotations

from collections import defaultdict

from preconditioner_protos.history import Event, Kind, Scope
from preconditioner_worker.history.case import Case, Key, key_of, scope_of
from preconditioner_worker.history.findings import Findings


def check_jobs(case: Case) -> Findings:
    """What a service took was sent by just that trainer; what a trainer received was published for it."""
    findings = Findings(9, "jobs")
    _compare(case, findings, Kind.SNAPSHOT_SENT, Kind.SNAPSHOT_ACCEPTED, "trainer")
    _compare(case, findings, Kind.PUBLISHED, Kind.RECEIVED, "service")
    _fences(case, findings)
    return findings


def _compare(case: Case, findings: Findings, made: Kind, seen: Kind, maker: str) -> None:
    """Whatever was seen must have been made before, for the same key and with the same digests."""
    # After a restart a version may be computed again, so a key can have several makings.
    makings: dict[Key, list[Event]] = defaultdict(list)
    owners: dict[str, set[tuple[str, int]]] = defaultdict(set)
    for event in case.of(made):
        makings[key_of(event)].append(event)
        for digest in event.data["digests"] or ():
            owners[digest].add((event.job or "", event.rank or 0))
    for event in case.of(seen):
        digests = event.data["digests"]
        if not digests:
            continue
        candidates = [m for m in makings.get(key_of(event), ()) if m.at <= event.at]
        if any(m.data["digests"] in (digests, None) for m in candidates):
            findings.looked_at += 1
            continue
        strangers = {
            owner for digest in digests for owner in owners.get(digest, ()) if owner[0] != (event.job or "")
        }
        if not strangers and case.may_be_unwritten(maker, event.at):
            continue
        findings.looked_at += 1
        if strangers:
            findings.broken(f"a matrix of job {min(strangers)[0]} reached job {event.job}", event)
        elif candidates:
            findings.broken(f"{seen.value}: another matrix than {made.value}", candidates[0], event)
        else:
            findings.broken(f"{seen.value} without {made.value}", event)


def _fences(case: Case, findings: Findings) -> None:
    """Within one life of a service, epochs of a job only grow."""
    for events in case.services.values():
        newest: dict[str, Scope] = {}
        for event in events:
            if event.job is None:
                continue
            scope = scope_of(event)
            if event.kind is Kind.SESSION_OPENED:
                known = newest.get(scope.job)
                findings.looked_at += 1
                if known is not None and scope.epoch < known.epoch:
                    findings.broken(f"epoch {scope.epoch} was opened after epoch {known.epoch}", event)
                newest[scope.job] = max(known or scope, scope, key=lambda s: s.epoch)
            elif event.kind in (Kind.SNAPSHOT_ACCEPTED, Kind.PUBLISHED, Kind.PUSHED):
                known = newest.get(scope.job)
                if known is not None and scope.epoch < known.epoch:
                    findings.broken(f"{event.kind.value} in an epoch that {known.epoch} had fenced", event)
