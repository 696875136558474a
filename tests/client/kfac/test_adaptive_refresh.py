"""Intervals that follow how fast factors change."""

from __future__ import annotations

import pytest
import torch

from kfac_models import Words, seeded, train
from preconditioner_client import KFAC, AdaptiveRefresh, LocalExchange, StalenessConfig, StatisticsConfig
from preconditioner_client.kfac.adaptive_refresh import Intervals, is_similar, next_interval


@pytest.mark.parametrize(
    ("last", "before", "like_last", "like_before", "expected"),
    [
        (8, 5, False, False, 4),
        (8, 5, False, True, 4),
        (5, 3, False, False, 2),
        (1, 1, False, False, 1),
        (8, 5, True, False, 8),
        (8, 5, True, True, 13),
    ],
)
def test_the_rule(last, before, like_last, like_before, expected):
    assert next_interval(last, before, like_last, like_before) == expected


def test_similarity_is_relative_to_the_earlier_matrix():
    before = torch.eye(3).repeat(3, 1, 1) * 2
    now = before * torch.tensor([1.0, 1.09, 1.11]).view(3, 1, 1)
    assert is_similar(now, before, 0.1).tolist() == [True, True, False]
    assert is_similar(before, torch.zeros(3, 3, 3), 0.1).tolist() == [False] * 3


def test_what_stays_the_same_grows_by_fibonacci_up_to_the_bound():
    intervals = Intervals(unit=2, longest=30)
    intervals.extend(2)
    grown = [intervals.refreshed(1, known, True, True) for known in range(8)]
    # Without two earlier snapshots nothing can be like them.
    assert grown == [2, 2, 4, 6, 10, 16, 26, 30]
    assert intervals.refreshed(1, 8, False, False) == 14
    assert intervals.refreshed(0, 2, True, True) == 4


def trained(beta, steps):
    torch.manual_seed(0)
    model = seeded(Words)
    optimizer = KFAC(
        model,
        lr=1e-6,
        service=LocalExchange(),
        staleness=StalenessConfig(refresh_every=1, max_staleness=20, stagger=False),
        statistics=StatisticsConfig(beta=beta),
        adaptive_refresh=AdaptiveRefresh(),
    )
    train(model, optimizer, range(steps))
    return optimizer


def test_factors_that_settle_are_sent_less_often():
    settled, fresh = trained(0.99, 25).metrics(), trained(0.0, 25).metrics()
    assert settled["blocks"] == fresh["blocks"] == 2
    # Factors of single small batches differ by more than a tenth, and are sent in every step.
    assert fresh["snapshots_sent"] == 2 * 25
    assert settled["snapshots_sent"] <= 30
    assert settled["age_max"] <= 10


def test_a_schedule_is_refused():
    with pytest.raises(ValueError, match="adaptive_refresh has no fixed schedule"):
        KFAC(
            Words(),
            service=LocalExchange(),
            staleness=StalenessConfig(refresh_every=2, adoption="scheduled", delay=2),
            adaptive_refresh=AdaptiveRefresh(),
        )
    with pytest.raises(ValueError, match=r"similar_below must be finite and > 0, not 0\.0"):
        AdaptiveRefresh(similar_below=0.0)
