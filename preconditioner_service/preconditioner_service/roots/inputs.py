"""From what a caller hands over to a stack of scaled, exactly symmetric float64 matrices.

Shapes: B matrices in a stack, N rows, P = N (N + 1) / 2 packed elements.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import spectrum
from .conditioning import Floats
from .errors import AsymmetricError, DtypeError, EmptyError, NotFiniteError, RootError, ShapeError
from .triangles import largest_asymmetry, mirror_upper, symmetrise, unpack
from .verification import multiply, probes, probes_of
from .workspace import scratch

_DTYPES = (np.dtype(np.float32), np.dtype(np.float64))
_HARMLESS_SHIFT = 32
"""Scales of 2^-32 to 2^32 leave so much of float64's range that nothing is gained by scaling."""
_LOOKED_UP_TO = 32
"""Rows up to which elements are compared with each other: a probe could hold too little of one of few."""
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
    stack: NDArray[Any]
    """As the caller handed it over."""
    rounded: bool
    """Whether matrices differed from their transposes by rounding."""
    probed_BKN: Floats | None = None
    """The scaled matrices times the probes of verification, where that was needed to see their symmetry."""

    def again(self, rows: Iterable[int]) -> Floats:
        """Return some of the scaled matrices as they were before `scaled_BNN` was worked on in place."""
        rows = list(rows)
        again_BNN = np.empty((len(rows), *self.scaled_BNN.shape[1:]))
        stack = self.stack[[self.index[k] for k in rows]]
        _fill(again_BNN, stack, [self.exponents[k] for k in rows])
        if self.rounded:
            symmetrise(again_BNN)
        return again_BNN


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
    whole = stack
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
    room_NN = spectrum.room(n) if len(stack) == 1 else None
    scaled_BNN = scratch("scaled", len(stack), n) if room_NN is None else room_NN[None]
    _fill(scaled_BNN, stack, exponents)
    if stack.ndim == 2:
        return Prepared(scaled_BNN, exponents, index, eps, errors, whole, rounded=False)
    if n > _LOOKED_UP_TO:
        probed_BKN = multiply(scaled_BNN, probes_of(len(stack), n))
        units = [math.ldexp(s, -e) for s, e in zip(scales, exponents, strict=True)]
        if _looks_symmetric(scaled_BNN, probed_BKN, units):
            return Prepared(scaled_BNN, exponents, index, eps, errors, whole, False, probed_BKN)
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
    rounded = any(asymmetries)
    if rounded:
        symmetrise(scaled_BNN)
    return Prepared(scaled_BNN, exponents, index, eps, errors, whole, rounded)


def _fill(scaled_BNN: Floats, stack: NDArray[Any], exponents: list[int]) -> None:
    """Write the scaled matrices of a stack, square or packed, to scaled_BNN."""
    if stack.ndim == 2:
        packed_BP = stack.astype(np.float64)
        _shift(packed_BP, exponents)
        unpack(packed_BP, scaled_BNN)
        mirror_upper(scaled_BNN)
        return
    np.copyto(scaled_BNN, stack)
    _shift(scaled_BNN, exponents)


def _looks_symmetric(stack_BNN: Floats, probed_BKN: Floats, scales: list[float]) -> bool:
    """Whether A^T v = A v for a random v, up to the rounding of these products; a tenth of looking it up."""
    n = stack_BNN.shape[1]
    difference_BN = np.matmul(probes(n)[0], stack_BNN)
    difference_BN -= probed_BKN[:, 0]
    worst = np.abs(difference_BN, out=difference_BN).max(axis=1).tolist()
    allowed = _PRODUCT_ROUNDING * math.sqrt(n)
    return all(most <= allowed * scale for most, scale in zip(worst, scales, strict=True))


def _shift(stack: Floats, exponents: list[int]) -> None:
    """Multiply each matrix by 2^-exponent, in place."""
    for matrix, exponent in zip(stack, exponents, strict=True):
        if abs(exponent) > _LARGEST_SHIFT:
            np.ldexp(matrix, -exponent, out=matrix)
        elif exponent:
            matrix *= 2.0**-exponent
