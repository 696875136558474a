"""First-order correction of a root for the backward error of its eigendecomposition.

LAPACK's spectrum belongs to A - E with ||E|| of a few eps ||A||. Multiplying out `R = Q^T A Q` shows E where
it matters, with less rounding than the reduction to tridiagonal form had, and the root of A is to first order

    X = Q F Q^T,   F_ij = f(l_i) on the diagonal,   f[l_i, l_j] R_ij off it

where l = diag(R) and f[., .] is the divided difference of f(l) = (l + ridge)^(-1/p) (Daleckii and Krein;
Higham, Functions of Matrices, theorem 3.9). Errors fall from up to 5 eps condition / p to a tenth of that
(measured, see METHODS.md).

It takes four matrix products. Up to n = 64 these are cheap beside the decomposition.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .conditioning import Floats

LARGEST = 64
"""Rows up to which a root is refined."""
_DECOMPOSITION_ERROR = 5.0 * float(np.finfo(np.float64).eps)
"""Times condition / p: the relative error of a root without refinement, at worst (measured)."""
_FIRST_ORDER = 0.35
_NEARLY_EQUAL = 1e-3


def worthwhile(n: int, condition: float, exponent: float) -> bool:
    """Whether a root may otherwise miss the accuracy that this package promises.

    That is a relative Frobenius error of 1e-10 up to a condition of 1e6, and 1e-16 condition n beyond.
    Where the error is of the order of the smallest eigenvalue, first order corrects nothing.
    """
    if n > LARGEST:
        return False
    promised = 1e-10 if condition <= 1e6 else 1e-16 * n * condition
    expected = _DECOMPOSITION_ERROR * condition
    return -exponent * expected > promised and expected < _FIRST_ORDER


def refined(
    scaled_BNN: Floats,
    rows_BNN: Floats,
    kept_BN: NDArray[np.bool_],
    ridge_B1: Floats,
    exponent: float,
) -> Floats:
    """Return B^exponent, exactly symmetric, corrected to first order.

    Args:
        scaled_BNN: A.
        rows_BNN: eigenvectors of A as rows.
        kept_BN: eigenvalues whose root is not zero.
        ridge_B1: what is added to the eigenvalues; zero with a pseudo-inverse.
        exponent: -1/p.
    """
    columns_BNN = rows_BNN.transpose(0, 2, 1)
    reduced_BNN = rows_BNN @ scaled_BNN @ columns_BNN
    n = reduced_BNN.shape[1]
    diagonal = np.arange(n)
    values_BN = np.maximum(reduced_BNN[:, diagonal, diagonal], 0.0) + ridge_B1
    roots_BN = np.where(kept_BN, np.where(kept_BN, values_BN, 1.0) ** exponent, 0.0)

    gap_BNN = values_BN[:, :, None] - values_BN[:, None, :]
    mean_BNN = 0.5 * (values_BN[:, :, None] + values_BN[:, None, :])
    close_BNN = np.abs(gap_BNN) <= _NEARLY_EQUAL * mean_BNN
    both_BNN = kept_BN[:, :, None] & kept_BN[:, None, :]
    slope_BNN = np.where(
        close_BNN,
        # Next to a threshold no correction is of first order any more; there is none then.
        np.where(both_BNN, exponent * np.where(both_BNN, mean_BNN, 1.0) ** (exponent - 1.0), 0.0),
        (roots_BN[:, :, None] - roots_BN[:, None, :]) / np.where(close_BNN, 1.0, gap_BNN),
    )
    correction_BNN = slope_BNN * reduced_BNN
    correction_BNN[:, diagonal, diagonal] = roots_BN
    root_BNN = columns_BNN @ correction_BNN @ rows_BNN
    return (root_BNN + root_BNN.transpose(0, 2, 1)) * 0.5
