"""The schedule of a soak: named by its seed, and without a kind that it leaves out."""

from __future__ import annotations

import itertools
from collections import Counter

from preconditioner_worker.faults.catalogue import CATALOGUE
from preconditioner_worker.faults.schedule import schedule

JOBS = ("a", "b")


def first(seed, count):
    return list(itertools.islice(schedule(seed, JOBS), count))


def test_a_seed_names_a_schedule():
    assert first(3, 50) == first(3, 50)
    assert first(3, 50) != first(4, 50)


def test_every_kind_comes_once_before_any_comes_twice():
    assert {planned.name for planned in first(5, len(CATALOGUE))} == set(CATALOGUE)


def test_later_ones_come_by_weight_and_hold_as_their_kind_says():
    drawn = first(0, 5000)[len(CATALOGUE) :]
    counts = Counter(planned.name for planned in drawn)
    total = sum(fault.weight for fault in CATALOGUE.values())
    for name, fault in CATALOGUE.items():
        share = fault.weight / total
        assert abs(counts[name] / len(drawn) - share) < 0.3 * share
    assert {planned.job for planned in drawn} == set(JOBS)
    assert all(CATALOGUE[p.name].hold[0] <= p.hold <= CATALOGUE[p.name].hold[1] for p in drawn)
