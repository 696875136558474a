"""How long steps took before and during a fault."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fault_catalogue import Fault
from trainer_process import Step

_NOISE_SECONDS = 0.15
"""What others on a shared machine may take from a step at any time."""


def check_step_times(fault: Fault, before: Sequence[Step], during: Sequence[Step]) -> None:
    """No step waited for the service, and none was longer than the machine explains."""
    last = during[-1].metrics
    assert last["waits"] == before[-1].metrics["waits"], f"{last['waits']} steps waited within the bound"
    usual, p99 = (np.percentile([step.seconds for step in steps], 99) for steps in (before, during))
    slowest = max(step.seconds for step in during)
    fault.note(
        f"steps: p99 {usual * 1e3:.0f} ms before, {p99 * 1e3:.0f} ms during, slowest {slowest * 1e3:.0f} ms"
    )
    assert p99 <= 2 * usual + _NOISE_SECONDS, f"p99 of the steps {usual:.3f} s before, {p99:.3f} s during"
