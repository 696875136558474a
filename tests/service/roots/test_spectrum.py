"""Eigendecompositions: LAPACK's own, and the one that comes back by larger blocks of reflectors."""

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preconditioner_service.roots import fortran, spectrum
from preconditioner_service.roots.reduction import Reduction

EPS = np.finfo(np.float64).eps


def check(matrix, values, rows):
    """Backward stable, orthogonal, ascending."""
    n = len(matrix)
    scale = max(np.linalg.norm(matrix), np.finfo(np.float64).tiny)
    assert np.linalg.norm((rows.T * values) @ rows - matrix) <= 10 * np.sqrt(n) * EPS * scale
    assert np.linalg.norm(rows @ rows.T - np.eye(n)) <= 10 * n * EPS
    assert (np.diff(values) >= 0).all()


@given(n=st.integers(3, 230), rank=st.integers(1, 230), seed=st.integers(0, 2**32 - 1))
def test_blocks_of_reflectors_of_any_size_and_rank(n, rank, seed):
    factor = np.random.default_rng(seed).standard_normal((n, rank))
    matrix = factor @ factor.T
    matrix = (matrix + matrix.T) / 2
    check(matrix, *spectrum.blocked(matrix.copy()))


@pytest.mark.parametrize("n", [3, 97, 98, 99, 200])
def test_blocks_where_there_is_nothing_to_reflect(n):
    for matrix in (np.zeros((n, n)), np.eye(n), np.diag(np.arange(n) - 3.0), np.ones((n, n))):
        check(matrix, *spectrum.blocked(matrix.copy()))
    half = np.zeros((n, n))
    half[: n // 2, : n // 2] = 1.0
    check(half, *spectrum.blocked(half.copy()))


def test_only_the_upper_triangle_is_read():
    factor = np.random.default_rng(0).standard_normal((500, 700))
    matrix = factor @ factor.T
    matrix = (matrix + matrix.T) / 2
    for n in (100, 500):
        part = np.ascontiguousarray(matrix[:n, :n])
        check(part, *spectrum.decompose(np.triu(part) + np.tril(np.full((n, n), np.nan), -1)))


def test_a_scipy_with_another_interface_is_served_by_lapack_s_own(monkeypatch):
    factor = np.random.default_rng(0).standard_normal((450, 450))
    matrix = factor @ factor.T
    matrix = (matrix + matrix.T) / 2
    blocked_N, _ = spectrum.decompose(matrix.copy())
    monkeypatch.setitem(fortran._ARGUMENTS, "dstedc", (fortran.cython_lapack, "ciiiiiiiiii"))
    fortran.routine.cache_clear()
    try:
        assert fortran.routine("dstedc") is None
        values_N, rows_NN = spectrum.decompose(matrix.copy())
    finally:
        monkeypatch.undo()
        fortran.routine.cache_clear()
    check(matrix, values_N, rows_NN)
    np.testing.assert_allclose(values_N, blocked_N, rtol=0, atol=1e-12 * values_N[-1])


@pytest.mark.parametrize(("n", "width"), [(1, 0), (2, 0), (3, 0), (3, 1), (5, 7), (33, 0), (33, 7), (70, 64)])
def test_memory_and_calls_serve_one_matrix_after_another(n, width):
    rng, reduction = np.random.default_rng(n), Reduction(n, width)
    for rank in (n, 1, 0, n):
        factor = rng.standard_normal((n, rank))
        matrix = factor @ factor.T
        matrix = (matrix + matrix.T) / 2
        rows = matrix.copy()
        check(matrix, reduction.decompose(rows, rows), rows)
        # Where it is reduced, too, it is no other.
        reduction.reduced_NN[...] = matrix
        check(matrix, reduction.decompose(reduction.reduced_NN[:], rows), rows)


@pytest.mark.parametrize("n", [3, 64, 130, 300])
def test_the_room_of_a_size_is_decomposed_into_other_memory(n):
    factor = np.random.default_rng(n).standard_normal((n, n))
    matrix = factor @ factor.T
    matrix = (matrix + matrix.T) / 2
    room = spectrum.room(n)
    room[...] = matrix
    values, rows = spectrum.decompose(room[None][0])
    assert not np.shares_memory(rows, room)
    check(matrix, values, rows)


def test_memory_that_lapack_cannot_write_is_refused():
    reduction = Reduction(4, 0)
    for matrix in (
        np.eye(8)[::2, ::2],
        np.eye(4, dtype=np.float32),
        np.eye(5),
        np.asfortranarray(np.ones((4, 4))),
    ):
        with pytest.raises(ValueError, match="are written to"):
            reduction.decompose(np.eye(4), matrix)


def test_threads_share_no_memory():
    """Calls leave the interpreter's lock, so these run at once."""
    stack = np.random.default_rng(0).standard_normal((4, 130, 130))
    stack = stack @ stack.transpose(0, 2, 1)
    stack = (stack + stack.transpose(0, 2, 1)) / 2
    expected = [spectrum.decompose(matrix.copy()) for matrix in stack]
    found: list[list] = [[] for _ in stack]

    def work(i):
        found[i] = [spectrum.decompose(stack[i].copy()) for _ in range(10)]

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(stack))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for matrix, (values, _), pairs in zip(stack, expected, found, strict=True):
        assert len(pairs) == 10
        for pair in pairs:
            check(matrix, *pair)
            np.testing.assert_allclose(pair[0], values, rtol=0, atol=1e-12 * values[-1])
