"""Inverse roots from the eigendecomposition: X = (Q d^1/2)(Q d^1/2)^T with d = eigenvalues(B)^(-1/p).

The product of a matrix with its own transpose is symmetric by construction and half the work (BLAS xSYRK).
Since A is decomposed and the ridge is added to its eigenvalues, a retry with a larger ridge costs one
product.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import blas

from . import refinement, spectrum
from .conditioning import Conditioning, Floats, condition
from .errors import IndefiniteError, ResidualError, RootError
from .inputs import Prepared, rounding_level
from .order import Order
from .solution import Solution, escalated, failure
from .triangles import mirror_upper
from .verification import default_bound, multiply, probes, residuals
from .workspace import scratch

_BATCHED_UP_TO = 128


def solve(
    prepared: Prepared,
    order: Order,
    conditioning: Conditioning,
    residual_bound: float | None,
    retries: int,
) -> tuple[Floats, list[Solution | RootError]]:
    """Return verified roots of the scaled matrices, (b, n, n), and for each how it came about or its error.

    The roots are scratch memory, valid until this thread calls again.
    """
    count, n = prepared.scaled_BNN.shape[:2]
    outcomes: list[Solution | RootError | None] = [None] * count
    values_BN = np.empty((count, n))
    vectors_BNN = scratch("vectors", count, n)
    for i in range(count):
        np.copyto(vectors_BNN[i], prepared.scaled_BNN[i])
        try:
            values_BN[i] = spectrum.decompose(vectors_BNN[i])[0]
        except np.linalg.LinAlgError as error:
            outcomes[i] = ResidualError(f"{error}; drop this snapshot, the next one will differ")
            values_BN[i] = 1.0
    largest_B = np.maximum(values_BN[:, -1], 0.0)
    allowed_B = rounding_level(n, prepared.eps) * np.maximum(largest_B, -values_BN[:, 0])
    indefinite_B = values_BN[:, 0] < -allowed_B
    for i in np.flatnonzero(indefinite_B) if indefinite_B.any() else ():
        unit = float(np.ldexp(1.0, int(prepared.exponent_B[i])))
        outcomes[i] = IndefiniteError(
            f"eigenvalue {values_BN[i, 0] * unit:.3g} is negative beyond rounding, which explains "
            f"{-allowed_B[i] * unit:.3g} beside the largest, {largest_B[i] * unit:.3g}; "
            f"statistics are sums of G G^T, so look at how these were made"
        )
    mean_B = np.maximum(np.add.reduce(values_BN, axis=1) / n, 0.0)
    level_B = conditioning.level(largest_B, mean_B, prepared.exponent_B)

    roots_BNN = scratch("roots", count, n)
    pending = [i for i in range(count) if outcomes[i] is None]
    for retry in range(retries + 1):
        if not pending:
            break
        tried_B = escalated(level_B[pending], largest_B[pending], n, retry)
        if len(pending) == count:
            attempt = _Attempt(prepared.scaled_BNN, values_BN, vectors_BNN, roots_BNN)
        else:
            attempt = _Attempt(
                prepared.scaled_BNN[pending],
                values_BN[pending],
                vectors_BNN[pending],
                np.empty((len(pending), n, n)),
            )
        attempt.run(tried_B, conditioning.truncates, order, residual_bound)
        if attempt.root_BNN is not roots_BNN:
            roots_BNN[pending] = attempt.root_BNN
        figures = zip(
            pending,
            values_BN[pending, 0].tolist(),
            largest_B[pending].tolist(),
            attempt.condition_B.tolist(),
            tried_B.tolist(),
            attempt.rank_B.tolist(),
            attempt.residual_B.tolist(),
            attempt.bound_B.tolist(),
            strict=True,
        )
        for i, smallest, largest, conditioned, level, rank, residual, bound in figures:
            if residual <= bound:
                outcomes[i] = Solution(0, smallest, largest, conditioned, level, rank, residual, bound, retry)
            elif retry == retries:
                unit = float(np.ldexp(1.0, int(prepared.exponent_B[i])))
                kind = "threshold" if conditioning.truncates else "ridge"
                outcomes[i] = ResidualError(failure(kind, level * unit, residual, bound, retries))
        pending = [i for i in pending if outcomes[i] is None]
    return roots_BNN, [outcome for outcome in outcomes if outcome is not None]


def _gram(factor_BNN: Floats, out_BNN: Floats) -> None:
    """Write F^T F of each F, exactly symmetric, to out_BNN."""
    if factor_BNN.shape[1] <= _BATCHED_UP_TO:
        # numpy sees that both operands are the same memory, calls xSYRK and mirrors in one pass. Where it is
        # built without BLAS it sums both triangles in the same order.
        np.matmul(factor_BNN.transpose(0, 2, 1), factor_BNN, out=out_BNN)
        return
    for factor_NN, out_NN in zip(factor_BNN, out_BNN, strict=True):
        blas.dsyrk(1.0, factor_NN.T, c=out_NN.T, lower=1, overwrite_c=1)
    mirror_upper(out_BNN)


class _Attempt:
    """Roots of a stack of decomposed matrices at given ridges or thresholds, and their residuals."""

    def __init__(self, scaled_BNN: Floats, values_BN: Floats, vectors_BNN: Floats, root_BNN: Floats) -> None:
        self.scaled_BNN = scaled_BNN
        self.values_BN = values_BN
        self.vectors_BNN = vectors_BNN
        self.root_BNN = root_BNN

    def run(self, level_B: Floats, truncates: bool, order: Order, residual_bound: float | None) -> None:
        """Set root_BNN, rank_B, condition_B, bound_B and residual_B."""
        count, n = self.values_BN.shape
        exponent = order.exponent
        conditioned_BN, self.kept_BN = condition(self.values_BN, level_B, truncates)
        self.rank_B = self.kept_BN.sum(axis=1)
        half_BN = conditioned_BN ** (exponent / 2.0)
        if truncates:
            half_BN[~self.kept_BN] = 0.0
            conditioned_BN[~self.kept_BN] = np.inf
        # Eigenvalues ascend. 0 / 0 of a zero matrix without a ridge is as singular as x / 0 is.
        self.condition_B = conditioned_BN[:, -1] / conditioned_BN.min(axis=1)
        self.condition_B[np.isnan(self.condition_B)] = np.inf
        self.condition_B[self.rank_B == 0] = 1.0
        bound_B = default_bound(n, self.condition_B, order)
        self.bound_B = bound_B if residual_bound is None else np.full(count, residual_bound)
        # A singular matrix without a ridge: nothing to compute, but a residual that no bound accepts.
        possible_B = np.isfinite(half_BN).all(axis=1) & np.isfinite(self.condition_B)
        half_BN[~possible_B] = 0.0

        factor_BNN = scratch("factor", count, n)
        np.multiply(self.vectors_BNN, half_BN[:, :, None], out=factor_BNN)
        _gram(factor_BNN, self.root_BNN)
        ridge_B = np.zeros(count) if truncates else level_B
        chosen_B = refinement.worthwhile(n, self.condition_B, exponent)
        if chosen_B.any():
            self.root_BNN[chosen_B] = refinement.refined(
                self.scaled_BNN[chosen_B],
                self.vectors_BNN[chosen_B],
                self.kept_BN[chosen_B],
                ridge_B[chosen_B],
                exponent,
            )
        residual_B = self._residuals(ridge_B, truncates, order)
        residual_B[np.isnan(residual_B) | ~possible_B] = np.inf
        self.residual_B = residual_B

    def _residuals(self, ridge_B: Floats, truncates: bool, order: Order) -> Floats:
        count, n = self.values_BN.shape
        columns_BNN = self.vectors_BNN.transpose(0, 2, 1)
        clipped_BN1 = np.minimum(self.values_BN, 0.0)[:, :, None]
        clips = bool(clipped_BN1.any())

        def apply_b(v_BNK: Floats) -> Floats:
            product_BNK = multiply(self.scaled_BNN, v_BNK)
            product_BNK += ridge_B[:, None, None] * v_BNK
            if clips:
                product_BNK -= multiply(columns_BNN, clipped_BN1 * multiply(self.vectors_BNN, v_BNK))
            return product_BNK

        start_BNK = np.broadcast_to(probes(n), (count, *probes(n).shape))
        if truncates:
            inside_BNK = self.kept_BN[:, :, None] * multiply(self.vectors_BNN, start_BNK)
            start_BNK = multiply(columns_BNN, inside_BNK)
        return residuals(apply_b, lambda v_BNK: multiply(self.root_BNN, v_BNK), order, start_BNK)
