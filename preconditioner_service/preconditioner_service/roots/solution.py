"""What a method hands back for one scaled matrix, before the scale is put back."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

_EPS = float(np.finfo(np.float64).eps)


@dataclass(slots=True)
class Solution:
    """How the verified root of a scaled matrix came about. Fields mean what those of `Diagnostics` do.

    `level` is the ridge or the threshold, `bound` the bound on the residual.
    """

    iterations: int
    smallest: float
    largest: float
    condition: float
    level: float
    rank: int
    residual: float
    bound: float
    retries: int


def escalated(level: float, largest: float, n: int, retries: int) -> float:
    """The ridge or threshold of a retry: ten times more each time, and never lost in rounding."""
    if retries == 0:
        return level
    return max(level, n * _EPS * largest) * math.pow(10.0, retries)


def failure(kind: str, level: float, residual: float, bound: float, retries: int) -> str:
    """The message of a ResidualError. `level` is in the statistics' units."""
    return (
        f"residual {residual:.3g} exceeds the bound {bound:.3g} with {kind} {level:.3g} "
        f"after {retries} retries; condition the matrix with a larger {kind}"
    )


def restore(value: float, exponent: int) -> float:
    """Return value * 2^exponent, infinite where that is beyond float64."""
    try:
        return math.ldexp(value, exponent)
    except OverflowError:
        return math.copysign(math.inf, value)
