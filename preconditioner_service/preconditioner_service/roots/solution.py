"""What a method hands back for one scaled matrix, before the scale is put back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .conditioning import Floats

_EPS = float(np.finfo(np.float64).eps)


@dataclass(slots=True)
class Solution:
    """How the verified root of a scaled matrix came about. Fields mean what those of `Diagnostics` do."""

    iterations: int
    smallest: float
    largest: float
    condition: float
    level: float
    rank: int
    residual: float
    residual_bound: float
    retries: int


def escalated(level_B: Floats, largest_B: Floats, n: int, retries: int) -> Floats:
    """The ridge or threshold of a retry: ten times more each time, and never lost in rounding."""
    if retries == 0:
        return level_B
    return np.maximum(level_B, n * _EPS * largest_B) * 10.0**retries


def failure(kind: str, level: float, residual: float, bound: float, retries: int) -> str:
    """The message of a ResidualError. `level` is in the statistics' units."""
    return (
        f"residual {residual:.3g} exceeds the bound {bound:.3g} with {kind} {level:.3g} "
        f"after {retries} retries; condition the matrix with a larger {kind}"
    )
