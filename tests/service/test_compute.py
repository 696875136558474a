"""The worker's side, without Ray."""

from __future__ import annotations

import numpy as np
import pytest

from preconditioner_protos import pack, unpack
from preconditioner_protos.v1 import preconditioner_pb2 as pb
from preconditioner_service.compute import compute
from preconditioner_service.tasks import RootTask
from raw_trainer import expected_root, statistics


def task(*matrices: np.ndarray, order=4.0, kind=pb.RIDGE_KIND_RELATIVE, ridge=1e-6, dtype="<f4") -> RootTask:
    return RootTask(
        lengths=tuple(len(matrix) for matrix in matrices),
        root_orders=(order,) * len(matrices),
        ridge_kind=kind,
        ridge_value=ridge,
        dtype=dtype,
        sides=tuple(pack(matrix) for matrix in matrices),
    )


def test_how_often_the_ridge_was_raised_is_told_of_every_side():
    singular = np.diag([0.0, 4.0])
    sound, raised = compute([task(statistics(2)), task(statistics(2), singular, ridge=0.0)])
    assert sound.retries == (0,)
    assert raised.retries[0] == 0
    assert raised.retries[1] > 0


def test_a_batch_of_different_sizes_comes_back_in_order():
    sizes = [(5, 9), (9,), (5, 5), (1,)]
    tasks = [task(*(statistics(n, seed=10 * i + n) for n in lengths)) for i, lengths in enumerate(sizes)]
    for i, (lengths, outcome) in enumerate(zip(sizes, compute(tasks), strict=True)):
        assert len(outcome.seconds) == len(lengths)
        assert all(seconds > 0 for seconds in outcome.seconds)
        for n, side in zip(lengths, outcome.sides, strict=True):
            assert side.dtype == np.dtype("<f4")
            assert side.flags.c_contiguous
            expected = expected_root(statistics(n, seed=10 * i + n))
            np.testing.assert_allclose(unpack(side, n), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "ridge", "expected"),
    [
        (pb.RIDGE_KIND_RELATIVE, 0.5, (2.0, 6.0)),
        (pb.RIDGE_KIND_ABSOLUTE, 1.0, (1.0, 5.0)),
        (pb.RIDGE_KIND_TRACE, 0.5, (1.0, 5.0)),
        (pb.RIDGE_KIND_PSEUDO_INVERSE, 1e-6, (np.inf, 4.0)),
    ],
)
def test_every_kind_of_ridge(kind, ridge, expected):
    (outcome,) = compute([task(np.diag([0.0, 4.0]), order=1.0, kind=kind, ridge=ridge, dtype="<f8")])
    values = np.diag(unpack(outcome.sides[0], 2))
    np.testing.assert_allclose(values, 1 / np.array(expected), rtol=1e-12)


def test_one_bad_side_fails_its_task_alone():
    bad = statistics(6)
    bad[0, 0] = np.nan
    indefinite = np.diag([1.0, -1.0, 1.0, 1.0, 1.0, 1.0]).astype(np.float32)
    good = statistics(6)
    tasks = [task(good, bad), task(good, good), task(indefinite), task(good, order=np.pi)]
    outcomes = compute(tasks)
    assert [outcome.sides is None for outcome in outcomes] == [True, False, True, True]
    assert [outcome.reason for outcome in outcomes] == [
        pb.NACK_REASON_NOT_FINITE,
        pb.NACK_REASON_UNSPECIFIED,
        pb.NACK_REASON_INDEFINITE,
        pb.NACK_REASON_ROOT_FAILED,
    ]
    assert outcomes[0].detail.startswith("side 1: ")


def test_statistics_are_not_written_to():
    given = task(statistics(10), statistics(300))
    for side in given.sides:
        side.flags.writeable = False
    (outcome,) = compute([given])
    assert outcome.sides is not None
