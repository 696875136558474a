"""Eigenbases for optimizers that work in the eigenbasis of their statistics."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import spectrum
from .errors import ResidualError
from .inputs import as_stack, prepare

_NEARLY_LARGEST = 0.9


@dataclass(frozen=True, eq=False)
class Eigenbasis:
    """A = vectors @ diag(values) @ vectors.T."""

    values: NDArray[np.float64]
    """(n,), ascending, in the statistics' units; rounding may make the smallest ones negative."""
    vectors: NDArray[np.float64]
    """(n, n), orthonormal columns, in the order of the values."""


def eigenbasis(matrix: ArrayLike) -> Eigenbasis:
    """Return eigenvalues and eigenvectors, with deterministic signs, of a symmetric matrix.

    The matrix may have any signature.

    The sign of a vector is such that the first of its elements that is nearly its largest in magnitude (0.9
    of it or more) is positive. So rounding cannot flip the sign of a vector with several elements of equal
    magnitude. Within a cluster of equal eigenvalues the vectors themselves are not determined, only their
    span is.

    Args:
        matrix: (n, n), or its packed upper triangle (n (n + 1) / 2,); float32 or float64. Never written to.

    Raises:
        InputError: no symmetric matrix (ShapeError, EmptyError, DtypeError).
        NotFiniteError, AsymmetricError: its elements are no symmetric matrix's.
        ResidualError: LAPACK did not converge.
    """
    stack, n = as_stack(np.asarray(matrix)[None])
    with np.errstate(all="ignore"):
        prepared = prepare(stack, n)
    if prepared.errors:
        raise prepared.errors[0]
    try:
        values_N, rows_NN = spectrum.decompose(prepared.scaled_BNN[0])
    except np.linalg.LinAlgError as error:
        raise ResidualError(f"{error}; drop this matrix, the next one will differ") from error
    magnitude_NN = np.abs(rows_NN)
    first_N = (magnitude_NN >= _NEARLY_LARGEST * magnitude_NN.max(axis=1, keepdims=True)).argmax(axis=1)
    # A new array: the rows are in memory that the next call writes to.
    signed_NN = rows_NN * np.copysign(1.0, rows_NN[np.arange(n), first_N])[:, None]
    with np.errstate(over="ignore"):
        return Eigenbasis(np.ldexp(values_N, prepared.exponents[0]), signed_NN.T)
