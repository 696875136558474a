"""Inverse roots from the eigendecomposition: X = (Q d^1/2)(Q d^1/2)^T with d = eigenvalues(B)^(-1/p).

The product of a matrix with its own transpose is symmetric by construction and half the work (BLAS xSYRK).
Since A is decomposed and the ridge is added to its eigenvalues, a retry with a larger ridge costs one
product.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from scipy.linalg import blas

from . import refinement, spectrum
from .conditioning import Conditioning, Floats, condition
from .errors import IndefiniteError, ResidualError, RootError
from .inputs import Prepared, rounding_level
from .solution import Solution, escalated, failure
from .triangles import mirror_upper
from .verification import default_bound, probes, residuals


def solve(
    prepared: Prepared,
    order: Fraction,
    conditioning: Conditioning,
    residual_bound: float | None,
    retries: int,
) -> list[Solution | RootError]:
    """Return a verified root, or the error, of each prepared matrix."""
    count, n = prepared.scaled_BNN.shape[:2]
    outcomes: list[Solution | RootError | None] = [None] * count
    values_BN = np.empty((count, n))
    vectors_BNN = prepared.scaled_BNN.copy()
    for i in range(count):
        try:
            values_BN[i], vectors_BNN[i] = spectrum.decompose(vectors_BNN[i])
        except np.linalg.LinAlgError as error:
            outcomes[i] = ResidualError(f"{error}; drop this snapshot, the next one will differ")
            values_BN[i] = 1.0
    largest_B = np.maximum(values_BN[:, -1], 0.0)
    allowed_B = rounding_level(n, prepared.eps) * np.maximum(largest_B, -values_BN[:, 0])
    for i in np.flatnonzero(values_BN[:, 0] < -allowed_B):
        unit = float(np.ldexp(1.0, int(prepared.exponent_B[i])))
        outcomes[i] = IndefiniteError(
            f"eigenvalue {values_BN[i, 0] * unit:.3g} is negative beyond rounding, which explains "
            f"{-allowed_B[i] * unit:.3g} beside the largest, {largest_B[i] * unit:.3g}; "
            f"statistics are sums of G G^T, so look at how these were made"
        )
    mean_B = np.maximum(np.trace(prepared.scaled_BNN, axis1=1, axis2=2) / n, 0.0)
    level_B = conditioning.level(largest_B, mean_B, prepared.exponent_B)

    pending = np.array([i for i in range(count) if outcomes[i] is None], dtype=np.intp)
    for retry in range(retries + 1):
        if not pending.size:
            break
        tried_B = np.array([escalated(level_B[i], largest_B[i], n, retry) for i in pending])
        whole = len(pending) == count
        attempt = _Attempt(
            prepared.scaled_BNN if whole else prepared.scaled_BNN[pending],
            values_BN if whole else values_BN[pending],
            vectors_BNN if whole else vectors_BNN[pending],
            tried_B,
            conditioning.truncates,
            order,
            residual_bound,
        )
        for k, i in enumerate(pending):
            residual, bound = float(attempt.residual_B[k]), float(attempt.bound_B[k])
            if residual <= bound:
                outcomes[i] = Solution(
                    attempt.root_BNN[k],
                    0,
                    float(values_BN[i, 0]),
                    float(largest_B[i]),
                    float(attempt.condition_B[k]),
                    float(tried_B[k]),
                    int(attempt.rank_B[k]),
                    residual,
                    bound,
                    retry,
                )
            elif retry == retries:
                unit = float(np.ldexp(1.0, int(prepared.exponent_B[i])))
                kind = "threshold" if conditioning.truncates else "ridge"
                outcomes[i] = ResidualError(failure(kind, tried_B[k] * unit, residual, bound, retries))
        pending = np.array([i for i in pending if outcomes[i] is None], dtype=np.intp)
    return [outcome for outcome in outcomes if outcome is not None]


class _Attempt:
    """Roots of a stack at given ridges or thresholds, and their residuals."""

    def __init__(
        self,
        scaled_BNN: Floats,
        values_BN: Floats,
        vectors_BNN: Floats,
        level_B: Floats,
        truncates: bool,
        order: Fraction,
        residual_bound: float | None,
    ) -> None:
        count, n = values_BN.shape
        conditioned_BN, kept_BN = condition(values_BN, level_B, truncates)
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            weights_BN = np.where(kept_BN, conditioned_BN ** (-1.0 / (2.0 * float(order))), 0.0)
            smallest_B = np.where(kept_BN, conditioned_BN, np.inf).min(axis=1)
            self.rank_B = kept_BN.sum(axis=1)
            ratio_B = np.where(smallest_B > 0, conditioned_BN[:, -1] / smallest_B, np.inf)
            self.condition_B = np.where(self.rank_B > 0, ratio_B, 1.0)
        bound_B = default_bound(n, self.condition_B, order)
        self.bound_B = bound_B if residual_bound is None else np.full(count, residual_bound)
        # A singular matrix without a ridge: nothing to compute, but a residual that no bound accepts.
        possible_B = np.isfinite(weights_BN).all(axis=1) & np.isfinite(self.condition_B)
        weights_BN[~possible_B] = 0.0

        factor_BNN = vectors_BNN * weights_BN[:, :, None]
        self.root_BNN = np.empty_like(factor_BNN)
        for i in range(count):
            blas.dsyrk(1.0, factor_BNN[i].T, c=self.root_BNN[i].T, lower=1, overwrite_c=1)
        mirror_upper(self.root_BNN)
        ridge_B = np.zeros(count) if truncates else level_B
        exponent = -1.0 / float(order)
        chosen_B = refinement.worthwhile(n, self.condition_B, exponent)
        if chosen_B.any():
            self.root_BNN[chosen_B] = refinement.refined(
                scaled_BNN[chosen_B], vectors_BNN[chosen_B], kept_BN[chosen_B], ridge_B[chosen_B], exponent
            )

        clipped_BN1 = np.minimum(values_BN, 0.0)[:, :, None]
        clips = bool(clipped_BN1.any())
        ridge_B11 = ridge_B[:, None, None]
        transposed_BNN = vectors_BNN.transpose(0, 2, 1)

        def apply_b(v_BNK: Floats) -> Floats:
            product_BNK = scaled_BNN @ v_BNK
            product_BNK += ridge_B11 * v_BNK
            if clips:
                product_BNK -= transposed_BNN @ (clipped_BN1 * (vectors_BNN @ v_BNK))
            return product_BNK

        start_BNK = np.broadcast_to(probes(n), (count, *probes(n).shape))
        if truncates:
            start_BNK = transposed_BNN @ (kept_BN[:, :, None] * (vectors_BNN @ start_BNK))
        residual_B = residuals(apply_b, lambda v_BNK: self.root_BNN @ v_BNK, order, start_BNK)
        residual_B[np.isnan(residual_B) | ~possible_B] = np.inf
        self.residual_B = residual_B
