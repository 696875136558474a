"""Rule 4 at the service: versions of a block grow within an epoch, and follow their snapshots."""

from __future__ import annotations

from preconditioner_protos.history import Event, Kind, Scope
from preconditioner_worker.history.case import Case, Key, key_of
from preconditioner_worker.history.findings import Findings

_GROWING = (Kind.SNAPSHOT_ACCEPTED, Kind.PUBLISHED)


def check_service_versions(case: Case) -> Findings:
    """Every accepted snapshot and every published root, in each session of each life of a service."""
    findings = Findings(4, "service_versions")
    for source, events in case.services.items():
        whole = case.history.sources[source].missing == 0
        newest: dict[tuple[Kind, Scope, int], int] = {}
        accepted: set[Key] = set()
        failed: dict[Key, Event] = {}
        for event in events:
            if event.kind is Kind.SESSION_OPENED:
                # The same epoch may be opened again once its session was lost; it begins anew.
                about = (event.job, event.rank, event.epoch)
                newest = {key: step for key, step in newest.items() if tuple(key[1]) != about}
                accepted = {key for key in accepted if tuple(key[0]) != about}
            if event.kind is Kind.ROOT_FAILED:
                failed[key_of(event)] = event
            if event.kind not in _GROWING:
                continue
            findings.looked_at += 1
            key = scope, block, version = key_of(event)
            known = newest.get((event.kind, scope, block), -1)
            if version <= known:
                findings.broken(f"{event.kind.value}: version {version} after version {known}", event)
            newest[event.kind, scope, block] = version
            if event.kind is Kind.SNAPSHOT_ACCEPTED:
                accepted.add(key)
            elif key not in accepted and whole:
                findings.broken(f"version {version} was published, and its snapshot never accepted", event)
            elif key in failed:
                findings.broken(f"version {version} was published after it had failed", failed[key], event)
    return findings
