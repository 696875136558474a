"""Statistics against SciPy and by hand; every verdict; when a task is void."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from preconditioner_worker.staleness.criteria import (
    CONFIDENCE,
    Verdict,
    interval,
    judge,
    margin,
    seeds_needed,
    steps_ratio,
    validity,
)

REFERENCE = [1.0, 2.0, 3.0]
STEPS = [100.0, 100.0, 100.0]


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=8).filter(lambda x: np.std(x) > 1e-6))
def test_the_interval_is_scipys(differences: list[float]) -> None:
    found = interval(differences)
    expected = stats.ttest_1samp(differences, 0.0).confidence_interval(CONFIDENCE)
    assert found.low == pytest.approx(expected.low, abs=1e-12)
    assert found.high == pytest.approx(expected.high, abs=1e-12)
    assert found.mean == pytest.approx(np.mean(differences), abs=1e-12)


def test_the_interval_of_three_by_hand() -> None:
    # t(0.95, 2) = 2.919986; standard deviation 0.01; root of 3.
    found = interval([0.01, 0.02, 0.03])
    assert found.high - found.mean == pytest.approx(2.919986 * 0.01 / math.sqrt(3), rel=1e-6)


def test_one_difference_says_nothing() -> None:
    assert interval([0.1]).low == -math.inf
    with pytest.raises(ValueError, match="at least one"):
        interval([])


def test_the_seeds_that_an_interval_needs_to_fit() -> None:
    needed = seeds_needed(0.004, 0.003)
    assert needed is not None

    def half(seeds: int) -> float:
        return stats.t.ppf(0.95, seeds - 1) * 0.004 / math.sqrt(seeds)

    assert half(needed) <= 0.003 < half(needed - 1)
    assert seeds_needed(1.0, 0.001) is None
    assert seeds_needed(0.0, 0.001) == 2


@pytest.mark.parametrize(("gap", "expected"), [(0.05, 0.005), (1.0, 0.02), (-1.0, 0.0)])
def test_the_margin(gap: float, expected: float) -> None:
    assert margin(gap) == pytest.approx(expected)


def test_the_ratio_of_steps() -> None:
    assert steps_ratio([110.0, 90.0, 100.0], STEPS) == 1.0
    assert steps_ratio([math.inf, math.inf, 100.0], STEPS) == math.inf
    assert steps_ratio([100.0, 100.0, 100.0], [math.inf, math.inf, 100.0]) is None
    assert steps_ratio([100.0, 50.0, 100.0], [math.inf, 100.0, 100.0]) == 0.75
    assert steps_ratio([0.0, 0.0], [0.0, 0.0]) is None


@pytest.mark.parametrize(
    ("differences", "steps", "verdict", "reason"),
    [
        ([0.001, 0.002, 0.0], STEPS, Verdict.HOLDS, "equivalent"),
        ([0.03, 0.031, 0.032], STEPS, Verdict.FAILS, "higher"),
        ([0.0, 0.0, 0.01], [106.0] * 3, Verdict.FAILS, "6.0% more steps"),
        ([0.0, 0.0, 0.001], [math.inf] * 3, Verdict.FAILS, "not reached"),
        ([-0.03, -0.031, -0.032], STEPS, Verdict.INCONCLUSIVE, "lower"),
        ([0.03, -0.03, 0.0], STEPS, Verdict.INCONCLUSIVE, "not within the margin (if"),
        ([math.inf, 0.0, 0.0], STEPS, Verdict.FAILS, "1 of 3 runs diverged"),
    ],
)
def test_verdicts(differences: list[float], steps: list[float], verdict: Verdict, reason: str) -> None:
    losses = [a + b for a, b in zip(REFERENCE, differences, strict=True)]
    found = judge(losses, REFERENCE, steps, STEPS, 0.02)
    assert found.verdict is verdict
    assert reason in found.reason


def test_seeds_are_asked_for_only_where_more_of_them_could_help() -> None:
    # Narrower than the margin, and beside it: three seeds suffice for an interval of that width.
    losses = [a - b for a, b in zip(REFERENCE, [0.03, 0.019, 0.02], strict=True)]
    found = judge(losses, REFERENCE, STEPS, STEPS, 0.02)
    assert (found.verdict, found.reason) == (Verdict.INCONCLUSIVE, "the interval is not within the margin")


def test_a_reference_that_misses_the_target_leaves_it_open() -> None:
    found = judge(REFERENCE, REFERENCE, STEPS, [math.inf] * 3, 0.02)
    assert (found.verdict, found.steps_ratio) == (Verdict.INCONCLUSIVE, None)


def test_a_task_is_void_unless_gap_and_controls_say_otherwise() -> None:
    failing = [("frozen", Verdict.FAILS), ("random", Verdict.FAILS)]
    assert validity([0.1, 0.11, 0.12], failing) == []
    assert "not clearly above zero" in validity([0.1, -0.1, 0.1], failing)[0]
    assert "no runs of the grafted diagonal" in validity([], failing)[0]
    for verdict in (Verdict.HOLDS, Verdict.INCONCLUSIVE):
        (reason,) = validity([0.1, 0.11, 0.12], [("frozen", verdict), failing[1]])
        assert reason == f"the negative control 'frozen' does not fail: its verdict is {verdict.value}"
    assert "no runs of the negative control" in validity([0.1, 0.11], [("frozen", None), failing[1]])[0]
