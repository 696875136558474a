"""Putting the scale back: X(A) = 2^(-e/p) X(A 2^-e), in the dtype asked for and only if it fits its range."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .conditioning import Floats
from .errors import RangeError
from .order import Order
from .result import Diagnostics
from .solution import Solution, restore
from .triangles import FULL_UP_TO, mirror_upper

_LARGEST_SHIFT = 1000
_LIMITS = {np.dtype(kind): np.finfo(kind) for kind in (np.float32, np.float64)}
_LOG2_TINY = {dtype: math.log2(limits.tiny) for dtype, limits in _LIMITS.items()}


def unscale(
    root_BNN: Floats, exponents: list[int], order: Order, dtype: np.dtype[Any]
) -> tuple[NDArray[Any], dict[int, RangeError]]:
    """Return the roots of the matrices as they came, (b, n, n), and errors for those that do not fit.

    Beyond `FULL_UP_TO` rows only the upper triangles of root_BNN are read. The result has both.
    """
    out_BNN = root_BNN.astype(dtype)  # as they are in most cases: of no scale to put back
    errors: dict[int, RangeError] = {}
    # Elements below the normal range are rounded to a fixed step; n^2 of these errors must stay small beside
    # the largest.
    lowest = _LOG2_TINY[dtype] + math.log2(2 * root_BNN.shape[1])
    # The largest element of a positive semi-definite matrix stands on its diagonal.
    top_B = np.diagonal(root_BNN, axis1=1, axis2=2).max(axis=1).tolist()
    for i, (top, exponent) in enumerate(zip(top_B, exponents, strict=True)):
        shift = exponent * order.exponent
        if top > 0 and not lowest <= math.log2(top) + shift < _LIMITS[dtype].maxexp:
            decades = (math.log2(top) + shift) * math.log10(2.0)
            way_out = "ask for float64" if dtype == np.float32 else "rescale the statistics"
            errors[i] = RangeError(
                f"the root's largest element, 1e{decades:.1f}, is out of the range of {dtype}; {way_out}"
            )
            continue
        if shift == 0.0:
            continue
        root_NN = root_BNN[i]
        if abs(shift) > _LARGEST_SHIFT:
            shift /= 2.0
            root_NN = root_NN * 2.0**shift
        np.multiply(root_NN, 2.0**shift, out=out_BNN[i], casting="same_kind")
    if root_BNN.shape[1] > FULL_UP_TO:
        mirror_upper(out_BNN)
    return out_BNN, errors


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
        solution.bound,
        solution.retries,
        seconds,
    )
