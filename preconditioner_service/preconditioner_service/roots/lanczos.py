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
_MORE_VECTORS = 2
_SEED = 0x1A2C_205
_TOLERANCE = 1e-7
"""On the residual, relative: the Ritz value's own error is of the order of its square."""


def largest_eigenvalue(matrix_NN: Floats) -> float:
    """Return a lower bound on the largest eigenvalue, usually correct to 1e-10 or better.

    A zero matrix has 0. Where the space of the first vector ends early, two more look for what it had no part
    in; fixed as they are, a matrix can be made of which none sees the largest eigenvalue.
    """
    n = len(matrix_NN)
    # A seed that no statistics are made from: the search sees only what its first vector has a part in.
    random = np.random.default_rng((_SEED, n))
    vector_N = random.standard_normal(n)
    vector_N /= np.linalg.norm(vector_N)
    more = _MORE_VECTORS
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
            ended = norm <= _TOLERANCE * max(map(abs, diagonal))
            if ended and more and not last:
                more -= 1
                norm, product_N = 0.0, random.standard_normal(n)
                for _ in range(2):
                    product_N -= known_KN.T @ (known_KN @ product_N)
                vector_N = product_N / np.linalg.norm(product_N)
                coupling.append(norm)
                continue
            if norm * abs(vectors_KK[-1, -1]) <= _TOLERANCE * abs(largest):
                return largest
        if last or norm == 0.0:
            break
        coupling.append(norm)
        vector_N = product_N / norm
    return largest
