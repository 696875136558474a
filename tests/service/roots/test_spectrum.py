"""Eigendecompositions: LAPACK's own, and the one that comes back by larger blocks of reflectors."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preconditioner_service.roots import fortran, spectrum

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
