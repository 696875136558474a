"""Symmetric eigendecomposition in place, by LAPACK's divide and conquer.

Source: LAPACK Users' Guide, xSYEVD (Cuppen 1981; Gu and Eisenstat 1995). Backward stable: the computed
spectrum is exact for a matrix within a modest multiple of `eps * ||A||` of A.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import lapack

from .conditioning import Floats


def decompose(matrix_NN: Floats) -> tuple[Floats, Floats]:
    """Decompose one exactly symmetric, C-contiguous matrix, which is overwritten.

    Returns:
        Ascending eigenvalues (n,), and eigenvectors as ROWS (n, n) in the memory of matrix_NN.

    Raises:
        np.linalg.LinAlgError: LAPACK did not converge (it never has on a finite matrix, but it may).
    """
    # The transposed view is Fortran-ordered and the same matrix, so LAPACK works on our memory. Its lower
    # triangle is the faster one to reduce.
    values_N, vectors, info = lapack.dsyevd(matrix_NN.T, lower=1, overwrite_a=1)
    if info != 0:
        raise np.linalg.LinAlgError(f"dsyevd did not converge (info = {info})")
    return values_N, vectors.T
