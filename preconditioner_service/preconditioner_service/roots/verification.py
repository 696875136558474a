"""Checking a root by what it must do to a few vectors, in O(n^2) per vector.

With p = a/b in lowest terms, X = B^(-1/p) satisfies X^a B^b = I, and all these matrices commute. The order
of the factors matters in rounding: B^b v first and X^a after amplifies its rounding by `condition^b`. Taking
the factor that brings the running exponent of B back towards zero keeps that exponent between -1/p and 1, so
the rounding stays at `eps * condition^max(1, 1/p)`, which is what a backward stable root has itself.

The error of a root shows in a random direction as `||X^p B - I||_F / sqrt(n)`; an error that lives in one
single eigenvector is diluted by 1/sqrt(n) and no more, up to the luck of the draw over the probes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from scipy.linalg import blas

from .conditioning import Floats
from .order import Order
from .triangles import FULL_UP_TO

PROBES = 2
LOOSEST_BOUND = 0.02
"""A root whose residual can only be bounded by more than this is not worth publishing."""
_EPS = float(np.finfo(np.float64).eps)
_SLACK = 4.0
_SEED = 0x5EED_0F_A_900F
"""No seed that statistics are made from: a probe that is an eigenvector sees nothing else."""

Apply = Callable[[Floats], Floats]


def default_bound(n: int, condition: float, order: Order) -> float:
    """The residual that rounding explains: `4 (a + b) n eps condition^max(1, 1/p)`, at most 0.02.

    It is a statement about the float64 root. Rounding the root to float32 afterwards adds up to
    `p 2^-24 condition^(1/p)`, which no method can avoid, and which is therefore not counted.
    """
    scale = _SLACK * (order.numerator + order.denominator) * n * _EPS
    try:
        return min(scale * math.pow(condition, max(1.0, -order.exponent)), LOOSEST_BOUND)
    except OverflowError:
        return LOOSEST_BOUND


@lru_cache(maxsize=64)
def probes(n: int) -> Floats:
    """Return fixed Gaussian unit vectors as rows, (2, n); read-only."""
    vectors_KN = np.random.default_rng((_SEED, n)).standard_normal((PROBES, n))
    vectors_KN /= np.linalg.norm(vectors_KN, axis=1, keepdims=True)
    vectors_KN.flags.writeable = False
    return vectors_KN


@lru_cache(maxsize=64)
def probes_of(count: int, n: int) -> Floats:
    """Return the probes of each matrix of a stack, (b, 2, n); read-only."""
    return np.broadcast_to(probes(n), (count, PROBES, n))


@lru_cache(maxsize=64)
def factors(order: Order) -> tuple[bool, ...]:
    """The order in which to apply b factors B (True) and a factors X (False), first to last."""
    sequence: list[bool] = []
    running = 0
    while len(sequence) < order.numerator + order.denominator:
        take_b = running <= 0
        running += order.numerator if take_b else -order.denominator
        sequence.append(take_b)
    return tuple(sequence)


def multiply(stack_BNN: Floats, rows_BKN: Floats) -> Floats:
    """Return each row times its symmetric matrix, of which beyond n = 128 only the upper triangle is read."""
    products_BKN = np.empty(rows_BKN.shape)
    if stack_BNN.shape[-1] <= FULL_UP_TO:
        for k in range(rows_BKN.shape[1]):
            # Twice as fast as both at once, for which BLAS would pack the matrix.
            np.matmul(stack_BNN, rows_BKN[:, k, :, None], out=products_BKN[:, k, :, None])
        return products_BKN
    for matrix_NN, rows_KN, products_KN in zip(stack_BNN, rows_BKN, products_BKN, strict=True):
        for row_N, product_N in zip(rows_KN, products_KN, strict=True):
            # Half the memory traffic of a general product, and no packing of the matrix for two columns.
            product_N[:] = blas.dsymv(1.0, matrix_NN.T, row_N, lower=1)
    return products_BKN


def project(rows_BKN: Floats, basis_BNN: Floats, weights_BN: Floats) -> Floats:
    """Return `Q diag(weights) Q^T` times each row, the rows of basis_BNN being the columns of Q."""
    inside_BKN = _times(rows_BKN, basis_BNN.transpose(0, 2, 1))
    inside_BKN *= weights_BN[:, None, :]
    return _times(inside_BKN, basis_BNN)


def residuals(apply_b: Apply, apply_x: Apply, order: Order, start_BKN: Floats) -> list[float]:
    """Return the largest `||X^a B^b v - v|| / ||v||` over the rows v, for each matrix of a stack.

    A row of zeros counts as met. NaN stands for a root so bad that it overflowed.
    """
    rows_BKN = start_BKN
    for is_b in factors(order):
        rows_BKN = apply_b(rows_BKN) if is_b else apply_x(rows_BKN)
    error_BKN = rows_BKN - start_BKN
    error_BK = np.einsum("bkn,bkn->bk", error_BKN, error_BKN)
    length_BK = np.einsum("bkn,bkn->bk", start_BKN, start_BKN)
    length_BK[length_BK == 0.0] = 1.0
    return [math.sqrt(worst) for worst in (error_BK / length_BK).max(axis=1).tolist()]


def _times(rows_BKN: Floats, matrix_BNN: Floats) -> Floats:
    """Return rows @ matrix; of a large matrix one row at a time, since BLAS repacks it otherwise."""
    if matrix_BNN.shape[-1] <= FULL_UP_TO:
        return rows_BKN @ matrix_BNN
    single = [rows_BKN[:, k : k + 1] @ matrix_BNN for k in range(rows_BKN.shape[1])]
    return np.concatenate(single, axis=1)
