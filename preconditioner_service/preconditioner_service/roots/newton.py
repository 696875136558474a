"""The coupled Newton iteration for B^(-1/m), m a positive integer.

    M_0 = z B,  H_0 = z^(1/m) I,  T = ((m + 1) I - M) / m,  M <- T^m M,  H <- H T

Sources: Guo and Higham (A Schur-Newton method for the matrix p-th root and its inverse, SIAM J. Matrix
Anal. Appl. 28, 2006), Iannazzo (2006); used for Shampoo by arXiv 2002.09018.

It converges for spectra of M_0 in (0, m + 1), quadratically in the end; small eigenvalues first grow by
((m + 1) / m)^m < e a step. `z = (m + 1) / (2 c)` with `c >= largest(B)` keeps half of that interval in
reserve.

Accuracy: rounding perturbs M by about eps in norm, which is eps * condition relative to its smallest
eigenvalue, so the relative error of H is a fraction of eps * condition, as that of a decomposition is. All
iterates are products of the same factors, so H commutes with B as well as rounding allows, and its errors
are small where H is small. A Newton step from H alone, H ((m + 1) I - H^m B) / m, looks like a polish but
loses just that: parts of the error that do not commute with B grow by up to condition^(1/2).
"""

from __future__ import annotations

import math

import numpy as np

from .conditioning import Floats

MOST_ITERATIONS = 100
_GROWTH = 1.2
_NEAR = 0.1
_EPS = float(np.finfo(np.float64).eps)


def coupled_newton(matrix_NN: Floats, m: int, largest: float) -> tuple[Floats, int]:
    """Return the best iterate for B^(-1/m), exactly symmetric, and how many iterations it took.

    Iteration ends when `||M - I||_F` is down to rounding, stagnates near it, or grows by more than 1.2
    times; the iterate with the smallest of these is returned. (The largest element of M - I, which earlier
    implementations look at, is small long before convergence where one eigenvector with many elements
    is late.) It is for the caller to verify the result.

    Args:
        matrix_NN: B, symmetric positive definite.
        m: order of the root.
        largest: an estimate of the largest eigenvalue from below; half of it is enough to converge.
    """
    n = len(matrix_NN)
    z = (m + 1) / (2.0 * spectral_bound(matrix_NN, largest))
    coupled_NN = z * matrix_NN
    root_NN = z ** (1.0 / m) * np.eye(n)
    best_NN, best = root_NN, math.inf
    error = _distance_from_identity(coupled_NN)
    iterations = 0
    while iterations < MOST_ITERATIONS and error > n * _EPS:
        step_NN = coupled_NN * (-1.0 / m)
        step_NN[np.diag_indices(n)] += (m + 1.0) / m
        coupled_NN = _symmetric(np.linalg.matrix_power(step_NN, m) @ coupled_NN)
        root_NN = root_NN @ step_NN
        iterations += 1
        previous, error = error, _distance_from_identity(coupled_NN)
        # The first iterate's spectrum may reach beyond 1, so nothing follows from the first error.
        if not math.isfinite(error) or (iterations > 1 and error > _GROWTH * previous):
            break
        if error < best:
            best_NN, best = root_NN, error
        if previous < _NEAR and error > previous / 2:
            break
    return _symmetric(best_NN), iterations


def corrected_inverse(matrix_NN: Floats, inverse_NN: Floats) -> Floats:
    """Return X + X (I - B X), symmetric, the residual being computed in extended precision.

    Iterative refinement (Higham, Accuracy and Stability of Numerical Algorithms, second edition, sections 12
    and 14): the error falls from up to half of eps condition to rounding of X, where the platform's long
    double is longer than a double. Its products are slow.
    """
    residual_NN = np.eye(len(matrix_NN)) - matrix_NN.astype(np.longdouble) @ inverse_NN.astype(np.longdouble)
    return _symmetric(inverse_NN + inverse_NN @ residual_NN.astype(np.float64))


def spectral_bound(matrix_NN: Floats, largest: float) -> float:
    """Return c with `largest(B) <= c`, or at the least a c that coupled_newton converges with.

    The 1-norm and the Frobenius norm bound the largest eigenvalue for certain, but up to sqrt(n) times too
    large, which costs iterations. An estimate from below, raised by 1%, is used instead: it would have to
    be wrong by half before an eigenvalue of M_0 left the region of convergence.
    """
    certain = min(float(np.abs(matrix_NN).sum(axis=1).max()), float(np.linalg.norm(matrix_NN)))
    return min(certain, 1.01 * largest)


def _symmetric(matrix_NN: Floats) -> Floats:
    return (matrix_NN + matrix_NN.T) * 0.5


def _distance_from_identity(matrix_NN: Floats) -> float:
    difference_NN = matrix_NN.copy()
    difference_NN[np.diag_indices(len(matrix_NN))] -= 1.0
    return float(np.linalg.norm(difference_NN))
