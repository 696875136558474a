"""The digits workload: deterministic, without leaks, with tensors of order four."""

from __future__ import annotations

import pytest
import torch

from preconditioner_worker.workloads.digits import HELD_OUT, DigitsWorkload


@pytest.fixture(scope="module")
def workload() -> DigitsWorkload:
    return DigitsWorkload()


def test_split_has_every_image_once(workload):
    images = torch.cat([workload.train.inputs, workload.held_out.inputs]).flatten(1)
    assert len(images) == 1797
    assert len(workload.held_out.targets) == HELD_OUT
    assert len(images.unique(dim=0)) == 1797
    assert len(workload.held_out.targets.unique()) == 10


def test_an_epoch_shows_each_image_at_most_once(workload):
    steps = len(workload.train.targets) // 64
    seen = torch.cat([workload.batch(0, step).inputs.flatten(1) for step in range(steps)])
    assert len(seen.unique(dim=0)) == 64 * steps


def test_batches_and_models_depend_on_the_seed_alone(workload):
    again = DigitsWorkload()
    assert torch.equal(workload.batch(1, 30).inputs, again.batch(1, 30).inputs)
    assert not torch.equal(workload.batch(1, 30).inputs, workload.batch(2, 30).inputs)
    one, two = (w.build_model(0).state_dict() for w in (workload, again))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_convolutions_are_of_order_four(workload):
    assert sum(p.ndim == 4 for p in workload.build_model(0).parameters()) == 2


def test_evaluation_of_an_untrained_model_is_chance(workload):
    loss, accuracy = workload.evaluate(workload.build_model(0))
    assert 2.2 < loss < 2.5
    assert accuracy < 0.3
