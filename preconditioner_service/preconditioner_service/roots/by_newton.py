"""Inverse roots by coupled Newton: no spectrum, products only.

A^(-b/a) is taken as (A^(-1/a))^b: raising a well computed positive definite root to a small power
multiplies its relative error by b and no more, while a root of A^-b would start from a condition raised to
the power b.

Eigenvalues cannot be clipped here, as they are never known: B = A + ridge I itself must be positive
definite. Where rounding left A with eigenvalues below -ridge, that is a retry with a larger ridge; where it
left some between -ridge and zero, the root differs from that of the clipped matrix by what rounding did. A
caller who wants the clipped root says by how much it may differ.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from scipy.linalg import lapack

from . import refinement
from .conditioning import Conditioning, Floats
from .errors import IndefiniteError, MethodError, ResidualError, RootError
from .inputs import Prepared, rounding_level
from .lanczos import largest_eigenvalue
from .newton import corrected_inverse, coupled_newton
from .order import Order
from .solution import Solution, escalated, failure, restore
from .verification import default_bound, multiply, probes, residuals

_CORRECTED = 2e5, 2e6
"""Conditions between which an inverse is corrected: the error of Newton's method, up to half of eps
condition, may be more than the 1e-10 that is promised up to 1e6. At 1e12 the correction spoils the root."""


class ClippingError(RootError):
    """Eigenvalues below zero, which are not clipped here, would show in the root."""


def solve(
    prepared: Prepared,
    order: Order,
    conditioning: Conditioning,
    residual_bound: float | None,
    retries: int,
    clipping: float = math.inf,
) -> tuple[Floats, list[Solution | RootError]]:
    """Return verified roots of the scaled matrices, (b, n, n), and for each how it came about or its error.

    Where a root would differ from that of the clipped matrix by more than `clipping`, relative to itself, the
    error is a ClippingError.

    Raises:
        MethodError: the conditioning is a pseudo-inverse, for which Newton's method has no equation.
    """
    if conditioning.truncates:
        raise MethodError("schur_newton has no pseudo-inverse; use method eigh or auto, or a ridge")
    roots_BNN = np.zeros_like(prepared.scaled_BNN)
    outcomes: list[Solution | RootError] = []
    for i, (scaled_NN, exponent) in enumerate(zip(prepared.scaled_BNN, prepared.exponents, strict=True)):
        try:
            roots_BNN[i], solution = _solve_one(
                scaled_NN, exponent, prepared.eps, order, conditioning, residual_bound, retries, clipping
            )
            outcomes.append(solution)
        except RootError as error:
            outcomes.append(error)
    return roots_BNN, outcomes


def _solve_one(
    scaled_NN: Floats,
    exponent: int,
    eps: float,
    order: Order,
    conditioning: Conditioning,
    residual_bound: float | None,
    retries: int,
    clipping: float,
) -> tuple[Floats, Solution]:
    n = len(scaled_NN)
    largest = max(largest_eigenvalue(scaled_NN), 0.0)
    level = conditioning.level(largest, max(float(np.trace(scaled_NN)) / n, 0.0), exponent)
    # An eigenvalue -d is taken to (ridge - d)^(-1/p) instead of ridge^(-1/p): d / (p ridge) more. A Lanczos
    # value would be no bound on d, as it finds the ends of a cluster at zero last.
    harmless = clipping * -level / order.exponent
    if math.isfinite(harmless) and not _is_definite(scaled_NN, harmless):
        raise ClippingError(f"eigenvalues below {restore(-harmless, exponent):.3g} need to be clipped")
    most_negative = -largest_eigenvalue(-scaled_NN)
    allowed = rounding_level(n, eps) * max(largest, -most_negative)
    if most_negative < -allowed or not (largest == 0.0 or _is_definite(scaled_NN, allowed)):
        raise IndefiniteError(
            f"eigenvalue {restore(min(most_negative, -allowed), exponent):.3g} or less is negative beyond "
            f"rounding, which explains {restore(-allowed, exponent):.3g} beside the largest, "
            f"{restore(largest, exponent):.3g}; "
            f"statistics are sums of G G^T, so look at how these were made"
        )
    ridge, residual, bound = 0.0, np.inf, 0.0
    for retry in range(retries + 1):
        ridge = escalated(level, largest, n, retry)
        if largest + ridge == 0.0 or not _is_definite(scaled_NN, ridge):
            continue
        conditioned_NN = scaled_NN.copy()
        conditioned_NN[np.diag_indices(n)] += ridge
        unit_root_NN, iterations = coupled_newton(conditioned_NN, order.numerator, largest + ridge)
        if not np.isfinite(unit_root_NN).all():
            continue
        smallest = float(np.float64(largest_eigenvalue(unit_root_NN)) ** -order.numerator)
        condition = max((largest + ridge) / smallest, 1.0) if smallest > 0.0 else math.inf
        if order.numerator == 1 and n <= refinement.LARGEST and _CORRECTED[0] < condition < _CORRECTED[1]:
            unit_root_NN = corrected_inverse(conditioned_NN, unit_root_NN)
        root_NN = np.linalg.matrix_power(unit_root_NN, order.denominator)
        root_NN = (root_NN + root_NN.T) * 0.5
        bound = default_bound(n, condition, order) if residual_bound is None else residual_bound
        (residual,) = residuals(
            functools.partial(multiply, conditioned_NN[None]),
            functools.partial(multiply, root_NN[None]),
            order,
            probes(n)[None],
        )
        if residual <= bound:
            return root_NN, Solution(
                iterations,
                smallest - ridge,
                largest,
                condition,
                ridge,
                n,
                residual,
                bound,
                retry,
            )
    raise ResidualError(failure("ridge", restore(ridge, exponent), residual, bound, retries))


def _is_definite(matrix_NN: Floats, shift: float) -> bool:
    """Whether A + shift I has a Cholesky factor."""
    shifted_NN = matrix_NN.copy()
    shifted_NN[np.diag_indices(len(shifted_NN))] += shift
    return int(lapack.dpotrf(shifted_NN.T, lower=1, overwrite_a=1, clean=0)[1]) == 0
