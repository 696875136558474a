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
from .triangles import FULL_UP_TO, largest_asymmetry, mirror_upper, symmetrise, unpack
from .verification import probes
from .workspace import scratch

_DTYPES = (np.dtype(np.float32), np.dtype(np.float64))
_HARMLESS_SHIFT = 32
"""Scales of 2^-32 to 2^32 leave so much of float64's range that nothing is gained by scaling."""
_PRODUCT_ROUNDING = 4.0 * float(np.finfo(np.float64).eps)
_LARGEST_SHIFT = 1000
"""Powers of two up to this are normal float64 numbers, and so are their inverses."""


@dataclass(frozen=True)
class Prepared:
    """The matrices of a stack that can be worked on, and the errors of those that cannot."""

    scaled_BNN: Floats
    """A * 2^-exponent, exactly symmetric; far from overflow and underflow in all that follows."""
    exponents: list[int]
    index: list[int]
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
    scales = [
        max(top, -low) for top, low in zip(flat.max(axis=1).tolist(), flat.min(axis=1).tolist(), strict=True)
    ]
    index = [i for i, scale in enumerate(scales) if math.isfinite(scale)]
    if len(index) < len(stack):
        for i in set(range(len(stack))).difference(index):
            count = flat.shape[1] - int(np.count_nonzero(np.isfinite(flat[i])))
            errors[i] = NotFiniteError(
                f"{count} of {flat.shape[1]} elements are NaN or infinite; "
                f"drop this snapshot and look at the gradients"
            )
        stack, scales = stack[index], [scales[i] for i in index]

    exponents = [math.frexp(max(scale, floor))[1] for scale in scales]
    exponents = [0 if abs(exponent) <= _HARMLESS_SHIFT else exponent for exponent in exponents]
    scaled_BNN = scratch("scaled", len(stack), n)
    if stack.ndim == 2:
        packed_BP = stack.astype(np.float64)
        _shift(packed_BP, exponents)
        unpack(packed_BP, scaled_BNN)
        mirror_upper(scaled_BNN)
        return Prepared(scaled_BNN, exponents, index, eps, errors)

    np.copyto(scaled_BNN, stack)
    _shift(scaled_BNN, exponents)
    if _looks_symmetric(scaled_BNN, [math.ldexp(s, -e) for s, e in zip(scales, exponents, strict=True)]):
        return Prepared(scaled_BNN, exponents, index, eps, errors)
    asymmetries = largest_asymmetry(stack).tolist()
    symmetric = []
    for k, (asymmetry, scale) in enumerate(zip(asymmetries, scales, strict=True)):
        allowed = rounding_level(n, eps) * scale
        if asymmetry <= allowed:
            symmetric.append(k)
            continue
        errors[index[k]] = AsymmetricError(
            f"elements differ from their transposed ones by up to {asymmetry:.3g}, "
            f"rounding explains {allowed:.3g}; symmetrise (A + A.T) / 2 first if that is meant"
        )
    if len(symmetric) < len(index):
        scaled_BNN = scaled_BNN[symmetric]
        exponents, index = [exponents[k] for k in symmetric], [index[k] for k in symmetric]
    if any(asymmetries):
        symmetrise(scaled_BNN)
    return Prepared(scaled_BNN, exponents, index, eps, errors)


def _looks_symmetric(stack_BNN: Floats, scales: list[float]) -> bool:
    """Whether A v = A^T v for a random v, up to the rounding of these products; a tenth of looking it up."""
    n = stack_BNN.shape[1]
    if n <= FULL_UP_TO:
        return False
    probe_N = probes(n)[0]
    for matrix_NN, scale in zip(stack_BNN, scales, strict=True):
        difference_N = matrix_NN @ probe_N
        difference_N -= probe_N @ matrix_NN
        if not np.abs(difference_N, out=difference_N).max() <= _PRODUCT_ROUNDING * math.sqrt(n) * scale:
            return False
    return True


def _shift(stack: Floats, exponents: list[int]) -> None:
    """Multiply each matrix by 2^-exponent, in place."""
    for matrix, exponent in zip(stack, exponents, strict=True):
        if abs(exponent) > _LARGEST_SHIFT:
            np.ldexp(matrix, -exponent, out=matrix)
        elif exponent:
            matrix *= 2.0**-exponent
