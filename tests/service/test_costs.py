"""The cost model learns from measured seconds."""

from __future__ import annotations

import pytest

from preconditioner_service.costs import CostModel


def test_before_any_measurement_cost_is_cubic():
    model = CostModel()
    assert model.estimate((1024,)) / model.estimate((512,)) == pytest.approx(8, rel=0.01)
    assert model.estimate((512, 256)) == pytest.approx(model.estimate((512,)) + model.estimate((256,)))


def test_measurements_take_over():
    model = CostModel()
    for _ in range(50):
        model.observe(512, 0.5)
    assert model.estimate((512,)) == pytest.approx(0.5, rel=0.01)
    # Sizes without a measurement follow the nearest that has one.
    assert model.estimate((1024,)) == pytest.approx(4.0, rel=0.01)


def test_one_outlier_moves_it_little():
    model = CostModel()
    for _ in range(50):
        model.observe(512, 0.1)
    model.observe(512, 10.0)
    assert model.estimate((512,)) < 2.2


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_what_is_no_measurement_is_ignored(seconds):
    model = CostModel()
    before = model.estimate((64,))
    model.observe(64, seconds)
    assert model.estimate((64,)) == before
    model.observe(64, 1e-9)
    assert model.estimate((64,)) > 0
