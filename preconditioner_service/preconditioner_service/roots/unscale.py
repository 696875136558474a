"""Putting the scale back: X(A) = 2^(-e/p) X(A 2^-e), in the dtype asked for and only if it fits its range."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .errors import RangeError, RootError
from .result import Diagnostics
from .solution import Solution

_LARGEST_SHIFT = 1000


def unscale(
    solution: Solution | RootError, exponent: int, order: Fraction, dtype: np.dtype[Any]
) -> NDArray[Any] | RootError:
    """Return the (n, n) root of the matrix as it came, or the error that stands in its place."""
    if isinstance(solution, RootError):
        return solution
    root_NN = solution.root_NN
    shift = -exponent / float(order)
    # The largest element of a positive semi-definite matrix stands on its diagonal.
    top = float(root_NN.diagonal().max())
    limits = np.finfo(dtype)
    if top > 0 and not math.log2(limits.tiny) <= math.log2(top) + shift < limits.maxexp:
        decades = (math.log2(top) + shift) * math.log10(2.0)
        way_out = "ask for float64" if dtype == np.float32 else "rescale the statistics"
        return RangeError(
            f"the root's largest element, 1e{decades:.1f}, is out of the range of {dtype}; {way_out}"
        )
    matrix_NN = np.empty(root_NN.shape, dtype)
    if abs(shift) > _LARGEST_SHIFT:
        root_NN, shift = root_NN * 2.0 ** (shift / 2), shift / 2
    with np.errstate(under="ignore"):
        np.multiply(root_NN, 2.0**shift, out=matrix_NN, casting="same_kind")
    return matrix_NN


def diagnostics(
    solution: Solution,
    exponent: int,
    truncates: bool,
    method: Literal["eigh", "schur_newton"],
    seconds: float,
) -> Diagnostics:
    """Return a solution's diagnostics in the units of the statistics."""
    level = restore(solution.level, exponent)
    return Diagnostics(
        method,
        solution.iterations,
        restore(solution.smallest, exponent),
        restore(solution.largest, exponent),
        solution.condition,
        0.0 if truncates else level,
        level if truncates else 0.0,
        solution.rank,
        solution.residual,
        solution.residual_bound,
        solution.retries,
        seconds,
    )


def restore(value: float, exponent: int) -> float:
    """Return value * 2^exponent, infinite where that is beyond float64."""
    try:
        return math.ldexp(value, exponent)
    except OverflowError:
        return math.copysign(math.inf, value)
