"""The shape of the learning rate: by fractions, so the same for every length."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from preconditioner_worker.schedule import Schedule


def test_climbs_to_one_then_falls_to_the_floor():
    schedule = Schedule(warmup=0.1, floor=0.1)
    factors = [schedule.factor(step, 100) for step in range(100)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[9] == max(factors) == 1
    assert all(a > b for a, b in itertools.pairwise(factors[9:]))
    assert factors[-1] == pytest.approx(0.1, abs=1e-3)
    assert factors[54] == pytest.approx(0.555, abs=0.01)


@given(st.integers(1, 400), st.integers(2, 5), st.floats(0, 0.9))
def test_the_shape_does_not_depend_on_the_length(steps, times, warmup):
    schedule = Schedule(warmup=warmup)
    for step in range(steps):
        factor = schedule.factor(step, steps)
        assert 0 < factor <= 1
        stretched = [schedule.factor(times * step + i, times * steps) for i in range(times)]
        assert min(stretched) - 0.5 <= factor <= max(stretched) + 0.5
    area = sum(schedule.factor(step, 1000 * times) for step in range(1000 * times)) / (1000 * times)
    assert area == pytest.approx(sum(schedule.factor(s, 1000) for s in range(1000)) / 1000, abs=2e-3)


@pytest.mark.parametrize("bad", [{"warmup": 1.0}, {"warmup": -0.1}, {"floor": 2.0}, {"shape": "line"}])
def test_settings_that_cannot_be_are_refused(bad):
    with pytest.raises(ValidationError):
        Schedule(**bad)
