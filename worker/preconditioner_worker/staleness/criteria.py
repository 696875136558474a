"""What "no significant loss" means here. Fixed before the first run; nothing of it can be set.

A delay **holds** if all of this is so, seed by seed against N = 1 of the same arm:

1. the 90% t-interval of the paired differences of final held-out losses lies within ± the margin,
   min(0.02 nats, 10% of the gap from the grafted diagonal alone to Shampoo at N = 1): two one-sided tests at
   5% (Schuirmann, 1987);
2. the median ratio of steps to the target is at most 1.05, the target being the final loss of the grafted
   diagonal alone with the same seed;
3. no run diverged.

It **fails** if a run diverged, if the interval lies wholly above the margin, or if the ratio of steps is
above 1.05. Everything else is **inconclusive**.

The **largest N that holds** is found by going up through the N that were run and stopping at the first that
does not hold: a fixed sequence of tests, in which each may keep its 5%. The greatest of all that hold would
be a maximum over uncorrected tests.

The task itself is **valid** if the gap is clear (the 90%
interval of the paired gaps is above zero), and if both negative controls, the first preconditioner frozen for
ever and random directions, fail the same test.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from scipy import stats

CONFIDENCE = 0.90
MARGIN_NATS = 0.02
MARGIN_OF_GAP = 0.10
STEPS_RATIO = 1.05


class Verdict(str, enum.Enum):
    """Of one condition."""

    HOLDS = "holds"
    FAILS = "fails"
    INCONCLUSIVE = "inconclusive"


@dataclass(frozen=True)
class Interval:
    """A mean and its two-sided confidence interval; infinite around one value alone."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Judgement:
    """A verdict and what it rests on.

    Attributes:
        verdict: see the module.
        reason: in words.
        difference: final loss minus that of N = 1, paired.
        steps_ratio: median over seeds, to the target; infinite where most never reached it, None where N = 1
            itself did not.
        seeds: pairs.
    """

    verdict: Verdict
    reason: str
    difference: Interval
    steps_ratio: float | None
    seeds: int


def interval(differences: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Student's t-interval of the mean of paired differences.

    Raises:
        ValueError: there are none.
    """
    values = np.asarray(differences, dtype=np.float64)
    if not values.size:
        raise ValueError("an interval needs at least one difference")
    mean = float(values.mean())
    if values.size == 1 or not np.isfinite(values).all():
        return Interval(mean, -math.inf, math.inf)
    half = float(
        stats.t.ppf(0.5 + confidence / 2, values.size - 1) * values.std(ddof=1) / math.sqrt(values.size)
    )
    return Interval(mean, mean - half, mean + half)


def seeds_needed(deviation: float, half_width: float, *, most: int = 1000) -> int | None:
    """Least number of seeds whose interval around an equal mean fits in the margin; None above ``most``.

    Args:
        deviation: standard deviation of the paired differences.
        half_width: of the zone of equivalence.
        most: where to stop looking.
    """
    for seeds in range(2, most + 1):
        quantile = float(stats.t.ppf(0.5 + CONFIDENCE / 2, seeds - 1))
        if quantile * deviation <= half_width * math.sqrt(seeds):
            return seeds
    return None


def margin(gap: float) -> float:
    """Half-width of the zone of equivalence.

    Args:
        gap: mean final loss of the grafted diagonal alone minus that of Shampoo at N = 1.
    """
    return min(MARGIN_NATS, MARGIN_OF_GAP * max(gap, 0.0))


def steps_ratio(steps: Sequence[float], reference: Sequence[float]) -> float | None:
    """Median over seeds of steps to the target against those of N = 1.

    None if N = 1 mostly never arrived, or there was nowhere to go: a diagonal that diverged is no target.
    """
    ratios = [a / b for a, b in zip(steps, reference, strict=True) if math.isfinite(b) and b > 0]
    if math.isinf(median(reference)) or not ratios:
        return None
    return float(median(ratios))


def judge(
    losses: Sequence[float],
    reference: Sequence[float],
    steps: Sequence[float],
    reference_steps: Sequence[float],
    half_width: float,
) -> Judgement:
    """The test that arms and negative controls have in common; sequences are in the order of the seeds.

    Args:
        losses: final held-out losses; infinite after a divergence.
        reference: those of N = 1.
        steps: to the target; infinite if it was not reached.
        reference_steps: those of N = 1.
        half_width: see :func:`margin`.
    """
    ratio = steps_ratio(steps, reference_steps)
    diverged = sum(not math.isfinite(loss) for loss in losses)
    if diverged:
        reason = f"{diverged} of {len(losses)} runs diverged"
        return Judgement(Verdict.FAILS, reason, Interval(math.inf, -math.inf, math.inf), ratio, len(losses))
    differences = [a - b for a, b in zip(losses, reference, strict=True)]
    found = interval(differences)
    verdict, reason = _verdict(found, ratio, half_width)
    if verdict is Verdict.INCONCLUSIVE and len(differences) > 1 and half_width > 0:
        needed = seeds_needed(float(np.std(differences, ddof=1)), half_width)
        if needed is None or needed > len(differences):
            reason += f" (if there is no difference, about {needed or 'over 1000'} seeds would show it)"
    return Judgement(verdict, reason, found, ratio, len(losses))


def _verdict(found: Interval, ratio: float | None, half_width: float) -> tuple[Verdict, str]:
    if found.low > half_width:
        return Verdict.FAILS, "the loss is higher by more than the margin"
    if ratio is not None and ratio > STEPS_RATIO:
        if math.isinf(ratio):
            return Verdict.FAILS, "the target is not reached"
        return Verdict.FAILS, f"{ratio - 1:.1%} more steps to the target"
    if found.high < -half_width:
        return Verdict.INCONCLUSIVE, "the loss is lower by more than the margin: no loss, but not equivalent"
    if not (-half_width <= found.low and found.high <= half_width):
        return Verdict.INCONCLUSIVE, "the interval is not within the margin"
    if ratio is None:
        return Verdict.INCONCLUSIVE, "N = 1 itself does not reach the target"
    return Verdict.HOLDS, "equivalent within the margin"


def validity(gaps: Sequence[float], controls: Sequence[tuple[str, Verdict | None]]) -> list[str]:
    """Why the task is void; empty if it is valid.

    Args:
        gaps: per seed, final loss of the grafted diagonal alone minus that of Shampoo at N = 1.
        controls: the negative controls' names and verdicts; None for one without runs.
    """
    reasons = []
    if not gaps:
        reasons.append("there are no runs of the grafted diagonal alone")
    elif not interval(gaps).low > 0:
        reasons.append("the gap from the grafted diagonal to Shampoo at N = 1 is not clearly above zero")
    for name, verdict in controls:
        if verdict is None:
            reasons.append(f"there are no runs of the negative control {name!r}")
        elif verdict is not Verdict.FAILS:
            reasons.append(f"the negative control {name!r} does not fail: its verdict is {verdict.value}")
    return reasons
