"""Scaled matrices, which are worked on in place, and made again where that is not enough."""

from fractions import Fraction

import numpy as np
import pytest

from preconditioner_service.roots import (
    AbsoluteRidge,
    AsymmetricError,
    PseudoInverse,
    RelativeRidge,
    inverse_root,
    inverse_roots,
    pack,
)
from preconditioner_service.roots.inputs import prepare
from preconditioner_service.roots.verification import probes


def wishart(n, seed=0, rank=None):
    gradient = np.random.default_rng(seed).standard_normal((n, rank or 2 * n))
    matrix = gradient @ gradient.T
    return (matrix + matrix.T) / 2


@pytest.mark.parametrize("n", [5, 150])
@pytest.mark.parametrize("kind", ["square", "packed", "rounded"])
def test_again_is_what_it_was(n, kind):
    stack = np.stack([wishart(n, seed) * scale for seed, scale in enumerate((1.0, 1e-30, 1e30, 1.0, 1.0))])
    stack[3] = np.nan
    if kind == "rounded":
        stack[0, 0] += 5e-15 * stack[0].max() * np.sign(probes(n)[0])
    given = np.stack([pack(matrix) for matrix in stack]) if kind == "packed" else stack
    prepared = prepare(given, n)
    assert (prepared.index, prepared.rounded) == ([0, 1, 2, 4], kind == "rounded")
    before = prepared.scaled_BNN.copy()
    prepared.scaled_BNN[...] = np.nan
    assert np.array_equal(prepared.again(range(4)), before)
    assert np.array_equal(prepared.again([3, 1]), before[[3, 1]])


@pytest.mark.parametrize("n", [2, 32, 33, 128, 129, 200])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_one_pair_that_differs_is_seen_whichever_it_is(n, dtype):
    random = np.random.default_rng(n)
    good = wishart(n).astype(dtype)
    far = 1e-4 if dtype is np.float32 else 1e-11
    for _ in range(20):
        row, column = random.choice(n, 2, replace=False)
        bad = good.copy()
        bad[row, column] += far * good.max()
        outcomes = inverse_roots(np.stack([good, bad, good]), 4)
        assert [isinstance(outcome, AsymmetricError) for outcome in outcomes] == [False, True, False]


@pytest.mark.parametrize("n", [40, 140])
@pytest.mark.parametrize("p", [1, 4, Fraction(4, 3)])
@pytest.mark.parametrize(
    "conditioning",
    [RelativeRidge(1e-6), AbsoluteRidge(0.0), PseudoInverse(1e-6)],
    ids=lambda c: type(c).__name__,
)
def test_what_needs_the_matrix_again_among_what_does_not(n, p, conditioning):
    """Retries, clipped and dropped eigenvalues and orders a/b, in one stack with none of these."""
    stack = np.stack([wishart(n), wishart(n, 1, n // 2), wishart(n, 2)])
    stack[0] = np.nan
    together = inverse_roots(stack, p, conditioning=conditioning, method="eigh", dtype=np.float64)
    for matrix, root in zip(stack[1:], together[1:], strict=True):
        alone = inverse_root(matrix, p, conditioning=conditioning, method="eigh", dtype=np.float64)
        assert np.array_equal(root.matrix, alone.matrix)
        assert root.diagnostics.residual == alone.diagnostics.residual <= root.diagnostics.residual_bound
