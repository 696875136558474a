"""Rule 1: a step waits only for blocks beyond the bound, only under ``wait``, and not without end.

Nor does it wait without saying so: what a step subtracts from its time as waited, its waits must have taken.
"""

from __future__ import annotations

from preconditioner_protos.history import Kind
from preconditioner_worker.history.case import Case, Life
from preconditioner_worker.history.findings import Findings
from preconditioner_worker.history.freshness import Freshness, replay

ROUNDING = 1e-5
"""Seconds: a step's waits and their sum are the same readings of one clock, each rounded to a microsecond."""


def check_waits(case: Case) -> Findings:
    """Every wait, as it began and as it ended."""
    findings = Findings(1, "waits")
    for life in case.lives:
        declared: dict[int | None, float] = {}
        for event, state in replay(life):
            if event.kind is Kind.STEP_ENDED:
                findings.looked_at += 1
                waits = declared.pop(event.step, 0.0)
                # The wait of a step may stand in a hole.
                if abs(event.data["waited"] - waits) > ROUNDING and life.whole:
                    findings.broken(
                        f"a step says that it waited {event.data['waited']:.6f} s, its waits took "
                        f"{waits:.6f} s",
                        event,
                    )
            elif event.kind is Kind.WAIT_BEGUN:
                assert event.step is not None  # by the format
                for_nothing = [b for b in event.data["blocks"] if not _is_late(life, state, b, event.step)]
                if life.setting("policy") != "wait":
                    findings.broken(f"a step waited under the policy {life.setting('policy')!r}", event)
                elif state.breaker_open:
                    findings.broken("a step waited although the breaker was open", event)
                elif for_nothing or not event.data["blocks"]:
                    findings.broken(
                        f"a step waited for the blocks {for_nothing}, whose age is within the bound of "
                        f"{life.setting('max_staleness')} steps",
                        event,
                    )
            elif event.kind is Kind.WAIT_ENDED:
                allowed = life.setting("stale_timeout") + case.expectations.wait_slack
                seconds = event.data["seconds"]
                declared[event.step] = declared.get(event.step, 0.0) + seconds
                if seconds > allowed and not case.was_stopped(event.job, event.at - seconds, event.at):
                    findings.broken(
                        f"a step waited {seconds:.2f} s; stale_timeout is {life.setting('stale_timeout')} s",
                        event,
                    )
    return findings


def _is_late(life: Life, state: Freshness, block: int, step: int) -> bool:
    if block in state.beyond(step, life.setting("max_staleness")):
        return True
    delay = life.setting("delay")
    # In a resumed run snapshots of the life before are under way, which this one does not show.
    begun = life.session.step or 0
    return delay is not None and (
        any(taken + delay <= step for taken in state.under_way.get(block, ()))
        or begun <= step <= begun + delay
    )
