"""Rule 5: what was acknowledged the service has, and finishes before it stops in order."""

from __future__ import annotations

from preconditioner_protos.history import Event, Kind
from preconditioner_worker.history.case import Case, Key, key_of, scope_of
from preconditioner_worker.history.findings import Findings


def check_acknowledged(case: Case) -> Findings:
    """Every receipt that a trainer got, and every drain."""
    findings = Findings(5, "acknowledged")
    accepted = {key_of(event) for event in case.of(Kind.SNAPSHOT_ACCEPTED)}
    for event in case.of(Kind.SNAPSHOT_ACKNOWLEDGED):
        known = key_of(event) in accepted
        if not known and case.may_be_unwritten("service", event.at):
            continue
        findings.looked_at += 1
        if not known:
            findings.broken("a snapshot was acknowledged that no service accepted", event)
    for source, events in case.services.items():
        # What was finished may stand in a hole.
        if case.history.sources[source].missing == 0:
            _drain(findings, events)
    return findings


def _drain(findings: Findings, events: list[Event]) -> None:
    """The newest acknowledged snapshot of every attached session's block must have been answered."""
    open_work: dict[tuple[object, int], Event] = {}
    attached: set[object] = set()
    unpushed: dict[Key, Event] = {}
    for event in events:
        scope = scope_of(event)
        if event.kind is Kind.STREAM_ATTACHED:
            attached.add(scope)
        elif event.kind in (Kind.STREAM_DETACHED, Kind.SESSION_CLOSED):
            attached.discard(scope)
        elif event.kind is Kind.SNAPSHOT_ACCEPTED:
            # A newer one takes the place of what was not computed: latest wins.
            open_work[scope, event.block or 0] = event
        elif event.kind in (Kind.PUBLISHED, Kind.ROOT_FAILED):
            newest = open_work.get((scope, event.block or 0))
            if newest is not None and newest.version == event.version:
                del open_work[scope, event.block or 0]
            if event.kind is Kind.PUBLISHED:
                unpushed = {key: e for key, e in unpushed.items() if key[:2] != (scope, event.block)}
                unpushed[key_of(event)] = event
        elif event.kind is Kind.PUSHED:
            unpushed.pop(key_of(event), None)
        elif event.kind is Kind.DRAIN_ENDED and event.data["complete"]:
            findings.looked_at += 1
            for (session, _), lost in open_work.items():
                if session in attached:
                    findings.broken("an acknowledged snapshot was not computed before the end", lost, event)
            for key, lost in unpushed.items():
                if key[0] in attached:
                    findings.broken("a preconditioner was not pushed before the end", lost, event)
