"""From what a caller hands over to a stack of scaled, exactly symmetric float64 matrices.

Shapes: B matrices in a stack, N rows, P = N (N + 1) / 2 packed elements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .conditioning import Floats
from .errors import AsymmetricError, DtypeError, EmptyError, NotFiniteError, RootError, ShapeError
from .triangles import largest_asymmetry, mirror_upper, symmetrise, unpack
from .workspace import scratch

_DTYPES = (np.dtype(np.float32), np.dtype(np.float64))
_HARMLESS_SHIFT = 32
"""Scales of 2^-32 to 2^32 leave so much of float64's range that nothing is gained by scaling."""
_LARGEST_SHIFT = 1000
"""Powers of two up to this are normal float64 numbers, and so are their inverses."""


@dataclass(frozen=True)
class Prepared:
    """The matrices of a stack that can be worked on, and the errors of those that cannot."""

    scaled_BNN: Floats
    """A * 2^-exponent, exactly symmetric; far from overflow and underflow in all that follows."""
    exponent_B: NDArray[np.int64]
    index_B: NDArray[np.intp]
    """Where each stands in the caller's stack."""
    eps: float
    """Unit roundoff of the dtype in which the statistics were accumulated."""
    errors: dict[int, RootError]


def rounding_level(n: int, eps: float) -> float:
    """How far symmetry or semi-definiteness may be off by rounding, relative to the matrix's scale.

    Symmetric noise of size s in every element has a spectral norm of about `2 s sqrt(n)` (Wigner's
    semicircle); a factor of 8 allows for statistics that were accumulated over many steps.
    """
    return 16.0 * eps * math.sqrt(n)


def as_stack(stack: ArrayLike) -> tuple[NDArray[Any], int]:
    """Check a (b, n, n) or (b, n (n + 1) / 2) array and return it with n.

    Raises:
        DtypeError, ShapeError, EmptyError: it is no such array.
    """
    array = np.asarray(stack)
    if array.dtype not in _DTYPES:
        raise DtypeError(f"dtype {array.dtype} is neither float32 nor float64; convert the matrix first")
    if array.ndim not in (2, 3):
        raise ShapeError(f"matrix of shape {array.shape[1:]} is neither (n, n) nor packed (n (n + 1) / 2,)")
    if array.ndim == 3 and array.shape[1] != array.shape[2]:
        raise ShapeError(f"matrix of shape {array.shape[1:]} is not square")
    if math.prod(array.shape[1:]) == 0:
        raise EmptyError(f"matrix of shape {array.shape[1:]} has no elements")
    if array.ndim == 3:
        return array, array.shape[1]
    n = (math.isqrt(8 * array.shape[1] + 1) - 1) // 2
    if n * (n + 1) // 2 != array.shape[1]:
        raise ShapeError(
            f"{array.shape[1]} elements are no packed upper triangle; n = {n} has {n * (n + 1) // 2}, "
            f"n = {n + 1} has {(n + 1) * (n + 2) // 2}"
        )
    return array, n


def prepare(stack: NDArray[Any], n: int, floor: float = 0.0) -> Prepared:
    """Scale and symmetrise each matrix; set aside those that are not finite or not symmetric.

    Args:
        stack: (b, n, n) or (b, n (n + 1) / 2), float32 or float64; never written to.
        n: rows of each matrix.
        floor: an absolute ridge, which must not overflow when it is scaled along.
    """
    errors: dict[int, RootError] = {}
    eps = float(np.finfo(stack.dtype).eps)
    flat = stack.reshape(len(stack), -1)
    largest_B = np.maximum(flat.max(axis=1), -flat.min(axis=1)).astype(np.float64)
    finite_B = np.isfinite(largest_B)
    for i in np.flatnonzero(~finite_B) if not finite_B.all() else ():
        count = flat.shape[1] - int(np.count_nonzero(np.isfinite(flat[i])))
        errors[int(i)] = NotFiniteError(
            f"{count} of {flat.shape[1]} elements are NaN or infinite; "
            f"drop this snapshot and look at the gradients"
        )
    index_B = np.flatnonzero(finite_B)
    if errors:
        stack, largest_B = stack[index_B], largest_B[index_B]

    asymmetry_B: Floats = np.zeros(len(stack))
    if stack.ndim == 3:
        asymmetry_B = largest_asymmetry(stack)
        allowed_B = rounding_level(n, eps) * largest_B
        symmetric_B = asymmetry_B <= allowed_B
        if not symmetric_B.all():
            for i in np.flatnonzero(~symmetric_B):
                errors[int(index_B[i])] = AsymmetricError(
                    f"elements differ from their transposed ones by up to {asymmetry_B[i]:.3g}, "
                    f"rounding explains {allowed_B[i]:.3g}; symmetrise (A + A.T) / 2 first if that is meant"
                )
            stack, index_B = stack[symmetric_B], index_B[symmetric_B]
            largest_B, asymmetry_B = largest_B[symmetric_B], asymmetry_B[symmetric_B]

    reference_B = np.maximum(largest_B, floor)
    exponent_B = np.frexp(reference_B)[1].astype(np.int64)
    exponent_B[np.abs(exponent_B) <= _HARMLESS_SHIFT] = 0
    scaled_BNN = scratch("scaled", len(stack), n)
    if stack.ndim == 3:
        np.copyto(scaled_BNN, stack)
        _shift(scaled_BNN, -exponent_B)
        if asymmetry_B.any():
            symmetrise(scaled_BNN)
    else:
        packed_BP = stack.astype(np.float64)
        _shift(packed_BP, -exponent_B)
        unpack(packed_BP, scaled_BNN)
        mirror_upper(scaled_BNN)
    return Prepared(scaled_BNN, exponent_B, index_B, eps, errors)


def _shift(stack: Floats, exponent_B: NDArray[np.int64]) -> None:
    if not exponent_B.any():
        return
    exponent = exponent_B.reshape(-1, *[1] * (stack.ndim - 1))
    if np.abs(exponent).max(initial=0) <= _LARGEST_SHIFT:
        stack *= np.ldexp(1.0, exponent)
    else:
        np.ldexp(stack, exponent, out=stack)
