"""The largest eigenvalue of a symmetric matrix from a few products with vectors.

Source: Lanczos with full reorthogonalisation (Golub and Van Loan, Matrix Computations, section 10.3; the
convergence theory is Kaniel's, Paige's and Saad's). A Ritz value never exceeds the largest eigenvalue.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import eigh_tridiagonal

from .conditioning import Floats

_STEPS = 96
_CHECK_EVERY = 8
_SEED = 0x1A2C_205
_TOLERANCE = 1e-7
"""On the residual, relative: the Ritz value's own error is of the order of its square."""


def largest_eigenvalue(matrix_NN: Floats) -> float:
    """Return a lower bound on the largest eigenvalue, usually correct to 1e-10 or better.

    It is exact up to rounding for n <= 96, and when the Krylov space of a fixed random vector ends early. A
    zero matrix has 0.
    """
    n = len(matrix_NN)
    # A seed that no statistics are made from: the search sees only what its first vector has a part in.
    vector_N = np.random.default_rng((_SEED, n)).standard_normal(n)
    vector_N /= np.linalg.norm(vector_N)
    basis_KN = np.empty((min(n, _STEPS), n))
    diagonal: list[float] = []
    coupling: list[float] = []
    largest = 0.0
    for step in range(len(basis_KN)):
        basis_KN[step] = vector_N
        product_N = matrix_NN @ vector_N
        diagonal.append(float(vector_N @ product_N))
        known_KN = basis_KN[: step + 1]
        for _ in range(2):
            product_N -= known_KN.T @ (known_KN @ product_N)
        norm = float(np.linalg.norm(product_N))
        last = step + 1 == len(basis_KN)
        if last or step % _CHECK_EVERY == _CHECK_EVERY - 1 or norm <= _TOLERANCE * max(map(abs, diagonal)):
            values_K, vectors_KK = eigh_tridiagonal(np.array(diagonal), np.array(coupling))
            largest = float(values_K[-1])
            if norm * abs(vectors_KK[-1, -1]) <= _TOLERANCE * abs(largest):
                return largest
        if last or norm == 0.0:
            break
        coupling.append(norm)
        vector_N = product_N / norm
    return largest
