"""Symmetric eigendecomposition in place, by LAPACK's divide and conquer.

Source: LAPACK Users' Guide, xSYEVD (Cuppen 1981; Gu and Eisenstat 1995). Backward stable: the computed
spectrum is exact for a matrix within a modest multiple of `eps * ||A||` of A.

xSYEVD is three calls: reduction to tridiagonal form, its decomposition, and the way back to the vectors of
A by Householder reflectors. The last one goes by 32 reflectors at a time and, on the hosts measured, took a
third of the whole at half the speed of a matrix product. Larger matrices therefore come back by reflectors
in larger blocks, `H_1 .. H_k = I - V U^-1 V^T` with `U = diag(1 / tau) + strictly upper (V^T V)` (the UT
transform: Puglisi 1992; Joffrain et al., ACM TOMS 32(2), 2006), which is three calls of level-3 BLAS a block
and as accurate.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import lapack

from . import fortran
from .conditioning import Floats
from .workspace import scratch

_BLOCKED_FROM = 448
"""Rows from which blocks are worth the calls (METHODS.md)."""
_WIDTH = 96


def decompose(matrix_NN: Floats) -> tuple[Floats, Floats]:
    """Decompose one exactly symmetric, C-contiguous matrix, which is overwritten.

    Only its upper triangle is read.

    Returns:
        Ascending eigenvalues (n,), and eigenvectors as ROWS (n, n) in the memory of matrix_NN.

    Raises:
        np.linalg.LinAlgError: LAPACK did not converge (it never has on a finite matrix, but it may).
    """
    if len(matrix_NN) >= _BLOCKED_FROM and fortran.routine("dstedc") is not None:
        return blocked(matrix_NN)
    # The transposed view is Fortran-ordered and the same matrix, so LAPACK works on our memory. Its lower
    # triangle is the faster one to reduce.
    values_N, vectors, info = lapack.dsyevd(matrix_NN.T, lower=1, overwrite_a=1)
    if info != 0:
        raise np.linalg.LinAlgError(f"dsyevd did not converge (info = {info})")
    return values_N, vectors.T


def blocked(matrix_NN: Floats) -> tuple[Floats, Floats]:
    """Do what `decompose` does, the way back by reflectors in blocks."""
    n = len(matrix_NN)
    tridiagonalise, divide_and_conquer = _need("dsytrd"), _need("dstedc")
    reduced_NN = scratch("reduced", 1, n)[0]
    np.copyto(reduced_NN, matrix_NN)
    values_N, off_N, tau_N = np.empty(n), np.empty(n), np.zeros(n)
    work = scratch("work", 1, n + 3).reshape(-1)  # LAPACK asks for n^2 + 4 n + 1
    integers = np.empty(3 + 5 * n, np.int32)
    info = ctypes.c_int()
    tridiagonalise(b"L", n, reduced_NN, n, values_N, off_N, tau_N, work, len(work), info)
    divide_and_conquer(b"I", n, values_N, off_N, matrix_NN, n, work, len(work), integers, len(integers), info)
    if info.value != 0:
        raise np.linalg.LinAlgError(f"dstedc did not converge (info = {info.value})")
    _reflect(matrix_NN, reduced_NN, tau_N, work)
    return values_N, matrix_NN


def _reflect(rows_NN: Floats, reduced_NN: Floats, tau_N: Floats, work: Floats) -> None:
    """Replace each row z by H_0 H_1 .. H_n-3 z, row i of reduced_NN holding reflector i from i + 2 on."""
    n = len(rows_NN)
    multiply, solve = _need("dgemm"), _need("dtrsm")
    for start in reversed(range(0, n - 2, _WIDTH)):
        k, length = min(_WIDTH, n - 2 - start), n - 1 - start
        tau_K = tau_N[start : start + k]
        v_KM = reduced_NN[start : start + k, start + 1 :].copy()
        np.copyto(v_KM[:, :k], 0.0, where=_lower(k))
        v_KM.reshape(-1)[:: length + 1] = 1.0
        if not tau_K.all():  # 0 stands for no reflection
            v_KM[tau_K == 0.0] = 0.0
            tau_K = np.where(tau_K == 0.0, 1.0, tau_K)
        u_KK = v_KM @ v_KM.T
        u_KK.reshape(-1)[:: k + 1] = 1.0 / tau_K
        # Z <- Z - (Z V^T) U^-T V for Z the columns that these reflectors reach.
        z_NM = rows_NN[:, start + 1 :]
        multiply(b"T", b"N", k, n, length, 1.0, v_KM, length, z_NM, n, 0.0, work, k)
        solve(b"L", b"L", b"T", b"N", k, n, 1.0, u_KK, k, work, k)
        multiply(b"N", b"N", length, n, k, -1.0, v_KM, length, work, k, 1.0, z_NM, n)


@lru_cache(maxsize=8)
def _lower(k: int) -> NDArray[np.bool_]:
    return np.tri(k, dtype=np.bool_)


def _need(name: str) -> fortran.Routine:
    found = fortran.routine(name)
    if found is None:
        raise RuntimeError(f"this build of scipy has no {name} of the usual interface")
    return found
