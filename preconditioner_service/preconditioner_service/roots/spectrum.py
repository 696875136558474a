"""Symmetric eigendecomposition in place, by LAPACK's divide and conquer.

Source: LAPACK Users' Guide, xSYEVD (Cuppen 1981; Gu and Eisenstat 1995). Backward stable: the computed
spectrum is exact for a matrix within a modest multiple of `eps * ||A||` of A.
"""

from __future__ import annotations

import threading
from functools import lru_cache

import numpy as np
from scipy.linalg import lapack

from . import fortran
from .conditioning import Floats
from .reduction import Reduction
from .workspace import scratch

_BLOCKED_FROM = 100
"""Rows from which blocks of reflectors of our own are worth the calls from Python (METHODS.md)."""
_WIDER_FROM = 300
_WIDTH, _WIDER = 32, 64
_KEPT_UP_TO = 724
"""Rows up to which memory is kept between calls; beyond, the work on it dwarfs what fresh pages cost."""
_KEPT_SIZES = 4


class _Kept(threading.local):
    """Memory and prepared calls of this thread, for the sizes that it had last."""

    def __init__(self) -> None:
        self.reduction = lru_cache(maxsize=_KEPT_SIZES)(Reduction)


_kept = _Kept()


def room(n: int) -> Floats | None:
    """Return memory for one matrix, (n, n), that `decompose` takes without a copy.

    It is valid until this thread decomposes another matrix of this size. None: there is no such memory, and
    any will do.
    """
    if n > _KEPT_UP_TO or fortran.routine("dstedc") is None:
        return None
    return _kept.reduction(n, _width(n)).reduced_NN


def decompose(matrix_NN: Floats) -> tuple[Floats, Floats]:
    """Decompose one exactly symmetric, C-contiguous matrix, which is overwritten.

    Only its upper triangle is read.

    Returns:
        Ascending eigenvalues (n,), and eigenvectors as ROWS (n, n) in the memory of matrix_NN; or, where that
        is of `room`, in scratch memory.

    Raises:
        np.linalg.LinAlgError: LAPACK did not converge (it never has on a finite matrix, but it may).
    """
    if fortran.routine("dstedc") is not None:
        return _by_parts(matrix_NN, _width(len(matrix_NN)))
    # The transposed view is Fortran-ordered and the same matrix, so LAPACK works on our memory. Its lower
    # triangle is the faster one to reduce.
    values_N, vectors, info = lapack.dsyevd(matrix_NN.T, lower=1, overwrite_a=1)
    if info != 0:
        raise np.linalg.LinAlgError(f"dsyevd did not converge (info = {info})")
    return values_N, vectors.T


def blocked(matrix_NN: Floats) -> tuple[Floats, Floats]:
    """Do what `decompose` does, the way back by reflectors in blocks whatever the size; n >= 3."""
    return _by_parts(matrix_NN, _width(len(matrix_NN), blocks_from=3))


def _width(n: int, blocks_from: int = _BLOCKED_FROM) -> int:
    """Reflectors in a block; 0 leaves that to LAPACK."""
    if n < blocks_from:
        return 0
    return _WIDTH if n < _WIDER_FROM else _WIDER


def _by_parts(matrix_NN: Floats, width: int) -> tuple[Floats, Floats]:
    n = len(matrix_NN)
    reduction = _kept.reduction(n, width) if n <= _KEPT_UP_TO else Reduction(n, width)
    rows_NN = scratch("vectors", 1, n)[0] if reduction.holds(matrix_NN) else matrix_NN
    return reduction.decompose(matrix_NN, rows_NN), rows_NN
