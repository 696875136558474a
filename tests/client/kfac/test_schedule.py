"""Schedules of large-batch K-FAC."""

from __future__ import annotations

import pytest
import torch

from preconditioner_client import PolynomialDecay, rescale_weights
from preconditioner_client.kfac import polynomial_decay, scaled_momentum


def test_decay_is_the_polynomial_and_held_outside():
    rates = [polynomial_decay(0.5, e, begin=2, end=6, power=3) for e in (0, 2, 3, 4, 6, 9)]
    assert rates == pytest.approx([0.5, 0.5, 0.5 * 0.75**3, 0.5 * 0.5**3, 0.0, 0.0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"begin": 3, "end": 3, "power": 1}, "end must be after"),
        ({"begin": 0, "end": 1, "power": 0}, "power"),
    ],
)
def test_impossible_decays_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        polynomial_decay(0.1, 0, **settings)


def test_momentum_keeps_its_ratio_to_the_learning_rate():
    assert scaled_momentum(0.9, 0.05, 0.1) == pytest.approx(0.45)
    assert scaled_momentum(0.9, 0.0, 0.0) == 0.0


def test_the_scheduler_sets_both_and_resumes():
    def make():
        parameter = torch.nn.Parameter(torch.ones(2))
        optimizer = torch.optim.SGD([parameter], lr=0.02, momentum=0.98)
        return optimizer, PolynomialDecay(optimizer, begin=1, end=5, power=2)

    optimizer, scheduler = make()
    for step in range(1, 6):
        optimizer.step()
        scheduler.step()
        left = polynomial_decay(1.0, step, begin=1, end=5, power=2)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.02 * left)
        assert optimizer.param_groups[0]["momentum"] == pytest.approx(0.98 * left)
        if step == 2:
            saved = optimizer.state_dict(), scheduler.state_dict()
    other, resumed = make()
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    other.step()
    resumed.step()
    assert other.param_groups[0]["momentum"] == pytest.approx(0.98 * 0.25)


def test_rescaled_weights_have_the_norm_of_their_outputs():
    weights = [torch.randn(8, 3, 3, 3), torch.zeros(4, 2)]
    direction = weights[0] / weights[0].norm()
    rescale_weights(weights)
    assert weights[0].norm().item() == pytest.approx(4.0, rel=1e-5)
    torch.testing.assert_close(weights[0] / weights[0].norm(), direction)
    assert not weights[1].any()
