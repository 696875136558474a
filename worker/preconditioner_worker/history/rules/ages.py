"""Rule 2: what is applied is not older than the bound, or the declared policy is seen to act."""

from __future__ import annotations

from preconditioner_protos.history import Kind
from preconditioner_worker.history.case import Case
from preconditioner_worker.history.findings import Findings
from preconditioner_worker.history.freshness import replay


def check_ages(case: Case) -> Findings:
    """Every block of every step."""
    findings = Findings(2, "ages")
    for life in case.lives:
        bound, policy = life.setting("max_staleness"), life.setting("policy")
        for event, state in replay(life):
            # Of a step that raised an error nobody knows what it applied, or whether its policy had its turn.
            if event.kind is not Kind.STEP_ENDED or event.data.get("raised"):
                continue
            assert event.step is not None  # by the format
            used = state.used if event.data["used"] is None else set(event.data["used"])
            findings.looked_at += len(used)
            beyond = state.beyond(event.step, bound)
            if policy != "keep" and (stale := beyond & used):
                ages = {block: event.step - state.versions[block] for block in sorted(stale)}
                findings.broken(
                    f"preconditioners beyond the bound of {bound} steps were applied; ages by block: {ages}",
                    event,
                )
            silent = sorted(block for block in beyond if state.acted_on.get(block) is None)
            if silent and life.whole:
                findings.broken(f"the blocks {silent} are beyond the bound and no policy acted", event)
            other = {state.acted_on[block] for block in state.acted_on} - _allowed(policy)
            if other:
                findings.broken(f"{', '.join(sorted(other))} acted, the policy is {policy!r}", event)
    return findings


def _allowed(policy: str) -> set[str]:
    return {"keep"} if policy == "keep" else {"graft"}
