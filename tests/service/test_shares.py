"""What holds a job back: work in flight and the token bucket of its refreshes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preconditioner_service.shares import Share


def test_nothing_holds_a_job_without_quotas():
    share = Share("job")
    for _ in range(100):
        assert share.hold(0.0, 1e9) is None
        share.take(1e9)


def test_work_in_flight_names_value_limit_and_setting():
    share = Share("job", max_in_flight_seconds=2.0)
    assert share.hold(0.0, 100.0) is None, "one block may always be in flight"
    share.take(1.5)
    hold = share.hold(0.0, 1.0)
    assert hold is not None
    assert hold.until == math.inf
    assert hold.why == (
        "1.5 s of work are in flight and the next block takes 1 s, allowed are 2 s (max_in_flight_seconds)"
    )
    assert share.hold(0.0, 0.5) is None
    share.done(1.5)
    assert share.hold(0.0, 100.0) is None


def test_the_rate_names_limit_setting_and_time():
    share = Share("job", max_refresh_rate=2.0)
    for _ in range(2):
        assert share.hold(10.0, 1.0) is None
        share.take(1.0)
    hold = share.hold(10.0, 1.0)
    assert hold is not None
    assert hold.until == pytest.approx(10.5)
    assert hold.why == ("the next refresh may begin in 0.5 s, allowed are 2 a second (max_refresh_rate)")
    assert share.hold(hold.until + 1e-9, 1.0) is None


def test_the_bucket_holds_one_refresh_of_every_block():
    share = Share("job", max_refresh_rate=1.0)
    share.blocks = 50
    taken = 0
    while share.hold(0.0, 1.0) is None:
        share.take(1.0)
        taken += 1
    assert taken == 50


def test_a_limit_that_is_lifted_or_set_holds_from_then_on():
    share = Share("job")
    share.take(1.0)
    share.max_refresh_rate = 1.0
    assert share.hold(0.0, 1.0) is None
    share.take(1.0)
    assert share.hold(0.0, 1.0) is not None
    share.max_refresh_rate = math.inf
    assert share.hold(0.0, 1.0) is None


@given(
    st.floats(0.1, 100),
    st.integers(0, 50),
    st.lists(st.floats(0, 2), min_size=1, max_size=100),
)
def test_no_more_than_the_bucket_and_the_rate_in_any_time(rate, blocks, pauses):
    share = Share("job", max_refresh_rate=rate)
    share.blocks = blocks
    most = max(rate, blocks, 1)
    now, taken = 0.0, 0
    for pause in pauses:
        now += pause
        while share.hold(now, 1.0) is None:
            share.take(1.0)
            taken += 1
        assert taken <= most + rate * now + 1e-6


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=50))
def test_nothing_in_flight_is_nothing_whatever_was_rounded(costs):
    share = Share("job", max_in_flight_seconds=1e-9)
    for cost in costs:
        share.take(cost)
    for cost in costs:
        assert share.hold(0.0, 1.0) is not None
        share.done(cost)
    assert share.hold(0.0, 1.0) is None
