"""What holds for every symmetric positive semi-definite matrix."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preconditioner_service.roots import (
    AbsoluteRidge,
    PseudoInverse,
    RelativeRidge,
    Root,
    TraceRidge,
    inverse_root,
    inverse_roots,
    pack,
)

ORDERS = st.sampled_from([1, 4 / 3, 2, 4, 6, 8, 0.5])
CONDITIONINGS = st.sampled_from([RelativeRidge(1e-6), RelativeRidge(1e-2), TraceRidge(1e-3)])
METHODS = st.sampled_from(["eigh", "schur_newton"])
EPS = float(np.finfo(np.float64).eps)


def orthogonal(rng, n):
    return np.linalg.qr(rng.standard_normal((n, n)))[0]


@st.composite
def statistics(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n = draw(st.integers(1, 20))
    rank = draw(st.integers(1, 2 * n))
    gradient = rng.standard_normal((n, rank)) * 10.0 ** rng.uniform(-draw(st.integers(0, 4)), 0, (n, 1))
    return gradient @ gradient.T, rng


def close(first, second, root, p, slack=50.0):
    """Equal up to what rounding makes of two backward stable computations."""
    growth = root.diagnostics.condition ** max(1.0, 1.0 / p)
    allowed = slack * max(1.0, 1.0 / p) * len(first) * EPS * growth
    assert np.linalg.norm(first - second) <= allowed * np.linalg.norm(second)


@settings(max_examples=60, deadline=None)
@given(statistics(), ORDERS, CONDITIONINGS, METHODS)
def test_symmetric_and_positive(case, p, conditioning, method):
    matrix, _ = case
    root = inverse_root(matrix, p, conditioning=conditioning, method=method, dtype=np.float64)
    assert np.array_equal(root.matrix, root.matrix.T)
    values = np.linalg.eigvalsh(root.matrix)
    assert values[0] > -1e-9 * values[-1]


@settings(max_examples=60, deadline=None)
@given(statistics(), ORDERS, CONDITIONINGS, METHODS, st.floats(-60, 60))
def test_scaling_law(case, p, conditioning, method, decades):
    matrix, _ = case
    factor = 10.0**decades
    plain = inverse_root(matrix, p, conditioning=conditioning, method=method, dtype=np.float64)
    scaled = inverse_root(factor * matrix, p, conditioning=conditioning, method=method, dtype=np.float64)
    close(scaled.matrix, factor ** (-1 / p) * plain.matrix, plain, p)


@settings(max_examples=60, deadline=None)
@given(statistics(), ORDERS, CONDITIONINGS, METHODS)
def test_orthogonal_equivariance(case, p, conditioning, method):
    matrix, rng = case
    rotation = orthogonal(rng, len(matrix))
    turned = rotation @ matrix @ rotation.T
    plain = inverse_root(matrix, p, conditioning=conditioning, method=method, dtype=np.float64)
    other = inverse_root(
        (turned + turned.T) / 2, p, conditioning=conditioning, method=method, dtype=np.float64
    )
    close(other.matrix, rotation @ plain.matrix @ rotation.T, plain, p)


@settings(max_examples=60, deadline=None)
@given(statistics(), ORDERS, CONDITIONINGS, METHODS)
def test_commutes_with_the_matrix(case, p, conditioning, method):
    matrix, _ = case
    root = inverse_root(matrix, p, conditioning=conditioning, method=method, dtype=np.float64)
    scale = np.linalg.norm(matrix) * np.linalg.norm(root.matrix)
    growth = root.diagnostics.condition ** max(1.0, 1 / p)
    commutator = matrix @ root.matrix - root.matrix @ matrix
    assert np.linalg.norm(commutator) <= 50 * max(1, 1 / p) * len(matrix) * EPS * growth * scale


@settings(max_examples=60, deadline=None)
@given(statistics(), ORDERS, CONDITIONINGS, METHODS)
def test_order_of_eigenvalues_is_reversed(case, p, conditioning, method):
    """Where the statistics are larger the root is smaller."""
    matrix, _ = case
    root = inverse_root(matrix, p, conditioning=conditioning, dtype=np.float64, method=method)
    _, vectors = np.linalg.eigh(matrix)
    along = np.einsum("ji,jk,ki->i", vectors, root.matrix, vectors)
    allowed = 50 * len(matrix) * EPS * root.diagnostics.condition ** max(1.0, 1 / p) * along.max()
    assert (np.diff(along) <= allowed).all()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 24),
    st.integers(1, 20),
    ORDERS,
    METHODS,
    st.booleans(),
    st.sampled_from([np.float32, np.float64]),
)
def test_batch_equals_single(seed, n, count, p, method, packed, dtype):
    rng = np.random.default_rng(seed)
    gradients = rng.standard_normal((count, n, max(1, n // 2))).astype(dtype)
    stack = np.stack([gradient @ gradient.T for gradient in gradients])
    if packed:
        stack = np.stack([pack(matrix) for matrix in stack])
    for matrix, result in zip(stack, inverse_roots(stack, p, method=method), strict=True):
        single = inverse_root(matrix, p, method=method)
        assert isinstance(result, Root)
        largest = np.abs(single.matrix).max()
        np.testing.assert_allclose(result.matrix, single.matrix, rtol=1e-6, atol=1e-6 * largest)
        assert result.diagnostics.ridge == pytest.approx(single.diagnostics.ridge, rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(statistics(), st.sampled_from([1, 2, 4]))
def test_pseudo_inverse_annihilates_what_it_drops(case, p):
    matrix, _ = case
    root = inverse_root(matrix, p, conditioning=PseudoInverse(1e-3), dtype=np.float64)
    values, vectors = np.linalg.eigh(matrix)
    dropped = vectors[:, values < 0.99e-3 * values[-1]]
    assert np.linalg.norm(root.matrix @ dropped) <= 1e-9 * np.linalg.norm(root.matrix)


@settings(max_examples=60, deadline=None)
@given(statistics(), ORDERS)
def test_methods_agree(case, p):
    matrix, _ = case
    first = inverse_root(matrix, p, method="eigh", dtype=np.float64)
    second = inverse_root(matrix, p, method="schur_newton", dtype=np.float64)
    close(second.matrix, first.matrix, first, p)


def test_absolute_ridge_beside_tiny_and_huge_statistics():
    for scale in (1e-300, 1e-30, 1.0, 1e30):
        root = inverse_root(scale * np.eye(3), 2, conditioning=AbsoluteRidge(4.0), dtype=np.float64)
        np.testing.assert_allclose(np.diag(root.matrix), (scale + 4.0) ** -0.5, rtol=1e-14)
