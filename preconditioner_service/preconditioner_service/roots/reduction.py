"""Divide and conquer in its three parts, on memory and with arguments that serve many matrices.

LAPACK's xSYEVD is a reduction to tridiagonal form (xSYTRD), the decomposition of that (xSTEDC), and the way
back to the vectors of A by Householder reflectors (xORMTR). Called one by one they need no copy of the
vectors, which saves a twentieth at 64 rows.

The way back goes by 32 reflectors at a time in LAPACK and, on the hosts measured, took a third of the whole
at half the speed of a matrix product. Larger matrices come back by `H_1 .. H_k = I - V U^-1 V^T` with
`U = diag(1 / tau) + strictly upper (V^T V)` (the UT transform: Puglisi 1992; Joffrain et al., ACM TOMS 32(2),
2006) instead, which is four calls of level-3 BLAS a block and as accurate. At 256 rows what Python
costs would eat up the gain if the arguments of these calls were not made once and for all.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.lib.stride_tricks import as_strided

from . import fortran
from .conditioning import Floats
from .fortran import integer, real

_ITEM = np.dtype(np.float64).itemsize
_TRIDIAGONALISED_TOGETHER = 12
"""Columns in a block on the way to tridiagonal form: of LAPACK's own 32, level-2 BLAS does a larger part."""
_NARROW_UP_TO = 512
"""Rows up to which that pays; beyond, the other update, of level 3, is short of memory bandwidth."""
_REFLECTED_TOGETHER = 16
"""Reflectors in a block of LAPACK's on the way back."""
_TRIANGLES = 65 * 64
"""Elements that xORMTR wants for the triangular factors of its blocks, beside n for each column of one."""


class Reduction:
    """Decomposes symmetric matrices of n rows, one at a time: not thread-safe."""

    def __init__(self, n: int, width: int) -> None:
        """Allocate 2 n^2 elements and prepare the calls.

        Args:
            n: rows.
            width: reflectors in a block on the way back; 0 leaves that to LAPACK.
        """
        self.reduced_NN = np.zeros((n, n))
        """What is reduced; a matrix that is put here is decomposed without a copy."""
        self._values_N, self._off_N, self._tau_N = np.zeros(n), np.zeros(n), np.zeros(n)
        # LAPACK narrows its blocks to the memory that it is given. What xSTEDC asks for, and xSYEVD hands on,
        # leaves xORMTR blocks of three reflectors at 64 rows, which take half as long again.
        back = _REFLECTED_TOGETHER * n + _TRIANGLES
        self._work = np.empty(max(n * n + 4 * n + 1, back))
        there = _TRIDIAGONALISED_TOGETHER * n if n <= _NARROW_UP_TO else len(self._work)
        self._integers = np.empty(3 + 5 * n, np.int32)
        self._info = ctypes.c_int()
        self._vectors = ctypes.c_void_p()

        size, info = integer(n), ctypes.byref(self._info)
        work = self._work.ctypes.data
        reduced, tau = self.reduced_NN.ctypes.data, self._tau_N.ctypes.data
        tridiagonal = self._values_N.ctypes.data, self._off_N.ctypes.data
        vectors = self._vectors, size
        self._tridiagonalise = partial(
            fortran.need("dsytrd"),
            *(b"L", size, reduced, size, *tridiagonal, tau, work, integer(there), info),
        )
        self._divide_and_conquer = partial(
            fortran.need("dstedc"),
            *(b"I", size, *tridiagonal, *vectors, work, integer(len(self._work))),
            *(self._integers.ctypes.data, integer(len(self._integers)), info),
        )
        self._reflect = (
            _Blocks(self.reduced_NN, self._tau_N, self._work, self._vectors, width)
            if width
            else partial(
                fortran.need("dormtr"),
                *(b"L", b"L", b"N", size, size, reduced, size, tau, *vectors, work, integer(back), info),
            )
        )

    def decompose(self, matrix_NN: Floats, rows_NN: Floats) -> Floats:
        """Decompose a matrix, of which the upper triangle is read.

        Args:
            matrix_NN: (n, n). `reduced_NN` itself is overwritten, and needs no copy; any other is left.
            rows_NN: where the eigenvectors go, as rows; may be the memory of a matrix_NN of the other kind.

        Returns:
            Ascending eigenvalues (n,).

        Raises:
            np.linalg.LinAlgError: no convergence.
            ValueError: rows_NN is no C-contiguous float64 array of (n, n), which LAPACK could write to.
        """
        expected = self.reduced_NN
        if rows_NN.shape != expected.shape or rows_NN.dtype != expected.dtype or not rows_NN.flags.carray:
            raise ValueError(
                f"eigenvectors are written to a C-contiguous float64 array of shape {expected.shape}, not to "
                f"one of {rows_NN.dtype} and shape {rows_NN.shape} with strides {rows_NN.strides}"
            )
        if matrix_NN is rows_NN or not self.holds(matrix_NN):
            np.copyto(expected, matrix_NN)
        self._vectors.value = fortran.address(rows_NN)
        self._tridiagonalise()
        self._divide_and_conquer()
        if self._info.value != 0:
            raise np.linalg.LinAlgError(f"dstedc did not converge (info = {self._info.value})")
        self._reflect()
        return self._values_N.copy()

    def holds(self, matrix_NN: Floats) -> bool:
        """Whether a matrix is in the memory of `reduced_NN`."""
        return np.may_share_memory(matrix_NN, self.reduced_NN)


class _Blocks:
    """Replaces each row z by H_0 H_1 .. H_n-3 z, row i of reduced_NN holding reflector i from i + 2 on."""

    def __init__(
        self, reduced_NN: Floats, tau_N: Floats, work: Floats, vectors: ctypes.c_void_p, width: int
    ) -> None:
        n = len(reduced_NN)
        count = n - 2
        width = min(width, count)
        self._vectors = vectors
        self._reduced_NN, self._tau_C = reduced_NN, tau_N[:count]
        v_CN = reduced_NN[:count, 1:]
        self._unit_C = reduced_NN.reshape(-1)[1 : count * (n + 1) : n + 1]
        whole = count // width
        step = v_CN.strides[0]
        self._below = [
            as_strided(v_CN, (whole, width, width), (width * (step + _ITEM), step, _ITEM)),
            v_CN[None, whole * width :, whole * width : count],
        ]
        self._masks = [np.tri(part.shape[1], k=-1, dtype=np.bool_) for part in self._below]
        blocks = -(-count // width)
        u_BKK = np.zeros((blocks, width, width))
        self._u_diagonal_BK = u_BKK.reshape(blocks, -1)[:, :: width + 1]
        self._inverse_tau_BK = np.ones((blocks, width))

        self._products: list[Callable[[], None]] = []
        self._way_back: list[Callable[[], None]] = []
        self._rows: list[tuple[ctypes.c_void_p, int]] = []
        multiply, solve, gram = (fortran.need(name) for name in ("dgemm", "dtrsm", "dsyrk"))
        one, zero, minus = real(1.0), real(0.0), real(-1.0)
        size, room, product = integer(n), integer(width), work.ctypes.data
        for block in reversed(range(blocks)):
            start = block * width
            k, length = integer(min(width, count - start)), integer(n - 1 - start)
            v = v_CN[start:, start:].ctypes.data, size
            u = u_BKK[block].ctypes.data, room
            rows = ctypes.c_void_p()
            self._rows.append((rows, (start + 1) * _ITEM))
            self._products.append(partial(gram, b"L", b"T", k, length, one, *v, zero, *u))
            # Z <- Z - (Z V^T) U^-T V for Z the columns that these reflectors reach.
            self._way_back += [
                partial(multiply, *(b"T", b"N", k, size, length, one, *v, rows, size, zero, product, room)),
                partial(solve, b"L", b"L", b"T", b"N", k, size, one, *u, product, room),
                partial(multiply, *(b"N", b"N", length, size, k, minus, *v, product, room, one, rows, size)),
            ]
        self._u_BKK = u_BKK

    def __call__(self) -> None:
        for part, mask in zip(self._below, self._masks, strict=True):
            np.copyto(part, 0.0, where=mask)
        self._unit_C[...] = 1.0
        tau_C = self._tau_C
        if not tau_C.all():  # 0 stands for no reflection
            none_C = tau_C == 0.0
            self._reduced_NN[:-2][none_C] = 0.0
            tau_C[none_C] = 1.0
        np.divide(1.0, tau_C, out=self._inverse_tau_BK.reshape(-1)[: len(tau_C)])
        for call in self._products:
            call()
        self._u_diagonal_BK[...] = self._inverse_tau_BK
        address = self._vectors.value or 0
        for rows, offset in self._rows:
            rows.value = address + offset
        for call in self._way_back:
            call()
