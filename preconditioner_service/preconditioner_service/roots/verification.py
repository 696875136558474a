"""Checking a root by what it must do to a few vectors, in O(n^2) per vector.

With p = a/b in lowest terms, X = B^(-1/p) satisfies X^a B^b = I, and all these matrices commute. The order
of the factors matters in rounding: B^b v first and X^a after amplifies its rounding by `condition^b`. Taking
the factor that brings the running exponent of B back towards zero keeps that exponent between -1/p and 1, so
the rounding stays at `eps * condition^max(1, 1/p)`, which is what a backward stable root has itself.

The error of a root shows in a random direction as `||X^p B - I||_F / sqrt(n)`; an error that lives in one
single eigenvector is diluted by 1/sqrt(n) and no more, up to the luck of the draw over the probes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from .conditioning import Floats
from .order import Order

PROBES = 2
LOOSEST_BOUND = 0.1
"""A root whose residual can only be bounded by more than this is not worth publishing."""
_EPS = float(np.finfo(np.float64).eps)
_SLACK = 4.0
_SKINNY_UP_TO = 512
_SEED = 0x5EED_0F_A_900F
"""No seed that statistics are made from: a probe that is an eigenvector sees nothing else."""

Apply = Callable[[Floats], Floats]


def default_bound(n: int, condition_B: Floats, order: Order) -> Floats:
    """The residual that rounding explains: `4 (a + b) n eps condition^max(1, 1/p)`, at most 0.1.

    It is a statement about the float64 root. Rounding the root to float32 afterwards adds up to
    `p 2^-24 condition^(1/p)`, which no method can avoid, and which is therefore not counted.
    """
    scale = _SLACK * (order.numerator + order.denominator) * n * _EPS
    return np.minimum(scale * condition_B ** max(1.0, -order.exponent), LOOSEST_BOUND)


@lru_cache(maxsize=64)
def probes(n: int) -> Floats:
    """Return fixed Gaussian unit vectors as columns, (n, 2); read-only."""
    vectors_NK = np.random.default_rng((_SEED, n)).standard_normal((n, PROBES))
    vectors_NK /= np.linalg.norm(vectors_NK, axis=0)
    vectors_NK.flags.writeable = False
    return vectors_NK


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


def multiply(stack_BNN: Floats, vectors_BNK: Floats) -> Floats:
    """Return stack @ vectors; of a large matrix one vector at a time, since BLAS repacks it otherwise."""
    if stack_BNN.shape[-1] <= _SKINNY_UP_TO:
        return stack_BNN @ vectors_BNK
    columns = [stack_BNN @ vectors_BNK[..., k : k + 1] for k in range(vectors_BNK.shape[-1])]
    return np.concatenate(columns, axis=-1)


def residuals(apply_b: Apply, apply_x: Apply, order: Order, start_BNK: Floats) -> Floats:
    """Return the largest `||X^a B^b v - v|| / ||v||` over the columns v, for each matrix of a stack, (b,).

    A column of zeros counts as met. NaN stands for a root so bad that it overflowed.
    """
    vectors_BNK = start_BNK
    for is_b in factors(order):
        vectors_BNK = apply_b(vectors_BNK) if is_b else apply_x(vectors_BNK)
    error_BNK = vectors_BNK - start_BNK
    error_BK = np.einsum("bnk,bnk->bk", error_BNK, error_BNK)
    length_BK = np.einsum("bnk,bnk->bk", start_BNK, start_BNK)
    length_BK[length_BK == 0.0] = 1.0
    worst_B: Floats = np.sqrt((error_BK / length_BK).max(axis=1))
    return worst_B
