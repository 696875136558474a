"""Inverse roots from the eigendecomposition: X = (Q d^1/2)(Q d^1/2)^T with d = eigenvalues(B)^(-1/p).

The product of a matrix with its own transpose is symmetric by construction and half the work (BLAS xSYRK).
Since A is decomposed and the ridge is added to its eigenvalues, a retry with a larger ridge costs one
product.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import blas

from . import refinement, spectrum
from .conditioning import Conditioning, Floats
from .errors import IndefiniteError, ResidualError, RootError
from .inputs import Prepared, rounding_level
from .order import Order
from .solution import Solution, escalated, failure, restore
from .triangles import FULL_UP_TO
from .verification import default_bound, multiply, probes_of, project, residuals
from .workspace import scratch


def solve(
    prepared: Prepared,
    order: Order,
    conditioning: Conditioning,
    residual_bound: float | None,
    retries: int,
) -> tuple[Floats, list[Solution | RootError]]:
    """Return verified roots of the scaled matrices, (b, n, n), and for each how it came about or its error.

    The scaled matrices are overwritten. The roots are scratch memory, valid until this thread calls again;
    beyond `FULL_UP_TO` rows only their upper triangles are.
    """
    # What is one number a matrix stays a Python float: after a decomposition the interpreter has left the
    # caches, and a numpy call costs as much as a pass over a matrix of 100 rows.
    count, n = prepared.scaled_BNN.shape[:2]
    outcomes: list[Solution | RootError | None] = [None] * count
    values_BN = np.empty((count, n))
    # Verification begins with A times its probes. Known beforehand, A itself need not outlive this.
    probed_BKN = prepared.probed_BKN
    if probed_BKN is None:
        probed_BKN = multiply(prepared.scaled_BNN, probes_of(count, n))
    vectors_BNN = prepared.scaled_BNN
    for i in range(count):
        try:
            values_BN[i], rows_NN = spectrum.decompose(vectors_BNN[i])
            if count == 1:  # its vectors may be elsewhere
                vectors_BNN = rows_NN[None]
        except np.linalg.LinAlgError as error:
            outcomes[i] = ResidualError(f"{error}; drop this snapshot, the next one will differ")
            values_BN[i] = 1.0
    levels: list[float] = []
    sums = np.add.reduce(values_BN, axis=1).tolist()
    for i, (exponent, total) in enumerate(zip(prepared.exponents, sums, strict=True)):
        smallest, largest = values_BN.item(i, 0), max(values_BN.item(i, n - 1), 0.0)
        allowed = rounding_level(n, prepared.eps) * max(largest, -smallest)
        if smallest < -allowed:
            outcomes[i] = _indefinite(smallest, largest, allowed, exponent)
        levels.append(conditioning.level(largest, max(total / n, 0.0), exponent))

    roots_BNN = scratch("roots", count, n)
    decomposed = _Decomposed(prepared, list(range(count)), probed_BKN, values_BN, vectors_BNN, roots_BNN)
    pending = [i for i in range(count) if outcomes[i] is None]
    for retry in range(retries + 1):
        if not pending:
            break
        attempt = decomposed if len(pending) == count else decomposed.part(pending)
        tried = [escalated(levels[i], max(values_BN.item(i, n - 1), 0.0), n, retry) for i in pending]
        figures = _attempt(attempt, tried, conditioning.truncates, order, residual_bound)
        if attempt is not decomposed:
            decomposed.root_BNN[pending] = attempt.root_BNN
        for i, level, figure in zip(pending, tried, figures, strict=True):
            if figure.residual <= figure.bound:
                smallest, largest = values_BN.item(i, 0), max(values_BN.item(i, n - 1), 0.0)
                condition, rank, residual, bound = figure
                outcomes[i] = Solution(
                    0, smallest, largest, condition, level, rank, residual, bound, retries=retry
                )
            elif retry == retries:
                kind = "threshold" if conditioning.truncates else "ridge"
                level = restore(level, prepared.exponents[i])
                outcomes[i] = ResidualError(failure(kind, level, figure.residual, figure.bound, retries))
        pending = [i for i in pending if outcomes[i] is None]
    return decomposed.root_BNN, [outcome for outcome in outcomes if outcome is not None]


def _indefinite(smallest: float, largest: float, allowed: float, exponent: int) -> IndefiniteError:
    return IndefiniteError(
        f"eigenvalue {restore(smallest, exponent):.3g} is negative beyond rounding, which explains "
        f"{restore(-allowed, exponent):.3g} beside the largest, {restore(largest, exponent):.3g}; "
        f"statistics are sums of G G^T, so look at how these were made"
    )


@dataclass(frozen=True)
class _Decomposed:
    """A stack of matrices, what they were decomposed into, and where their roots go."""

    prepared: Prepared
    rows: list[int]
    """Where each stands among the prepared matrices."""
    probed_BKN: Floats
    """A times each probe."""
    values_BN: Floats
    """Ascending."""
    vectors_BNN: Floats
    """As rows."""
    root_BNN: Floats

    def part(self, rows: list[int]) -> _Decomposed:
        """Copies of some of them, and room for their roots."""
        n = self.values_BN.shape[1]
        return _Decomposed(
            self.prepared,
            [self.rows[i] for i in rows],
            self.probed_BKN[rows],
            self.values_BN[rows],
            self.vectors_BNN[rows],
            np.empty((len(rows), n, n)),
        )

    def matrices(self, which: list[int] | None = None) -> Floats:
        """Return the scaled matrices, made once more."""
        return self.prepared.again(self.rows if which is None else [self.rows[i] for i in which])


class _Figures(NamedTuple):
    """What is known of an attempted root; fields mean what those of `Solution` do."""

    condition: float
    rank: int
    residual: float
    bound: float


def _attempt(
    of: _Decomposed, levels: list[float], truncates: bool, order: Order, residual_bound: float | None
) -> list[_Figures]:
    """Write the roots at these ridges or thresholds to of.root_BNN and verify them."""
    count, n = of.values_BN.shape
    exponent = order.exponent
    level_B1 = np.array(levels)[:, None]
    conditioned_BN = np.maximum(of.values_BN, 0.0)
    kept_BN = None
    ranks = [n] * count
    if truncates:
        kept_BN = conditioned_BN > level_B1
        ranks = kept_BN.sum(axis=1).tolist()
        conditioned_BN[~kept_BN] = np.inf  # whose root is zero
    else:
        conditioned_BN += level_B1
    half_BN = conditioned_BN ** (exponent / 2.0)
    conditions = []
    for i, rank in enumerate(ranks):
        # Eigenvalues ascend, and those that are dropped come first.
        smallest, largest = conditioned_BN.item(i, n - rank if rank else 0), conditioned_BN.item(i, n - 1)
        conditions.append(1.0 if rank == 0 else largest / smallest if smallest > 0.0 else math.inf)
        if not math.isfinite(conditions[i]) or not math.isfinite(half_BN.item(i, n - rank if rank else 0)):
            # A singular matrix without a ridge: nothing to compute, but a residual that no bound accepts.
            conditions[i] = math.inf
            half_BN[i] = 0.0

    # What was reduced is of no more use, and its memory is near.
    spent_NN = spectrum.room(n) if count == 1 else None
    factor_BNN = scratch("factor", count, n) if spent_NN is None else spent_NN[None]
    np.multiply(of.vectors_BNN, half_BN[:, :, None], out=factor_BNN)
    _gram(factor_BNN, of.root_BNN)
    ridge_B1 = np.zeros((count, 1)) if truncates else level_B1
    chosen = [i for i in range(count) if refinement.worthwhile(n, conditions[i], exponent)]
    if chosen:
        of.root_BNN[chosen] = refinement.refined(
            of.matrices(chosen),
            of.vectors_BNN[chosen],
            np.ones((len(chosen), n), np.bool_) if kept_BN is None else kept_BN[chosen],
            ridge_B1[chosen],
            exponent,
        )
    bounds = [
        default_bound(n, condition, order) if residual_bound is None else residual_bound
        for condition in conditions
    ]
    figures = zip(conditions, ranks, _residuals(of, ridge_B1, kept_BN, order), bounds, strict=True)
    return [
        _Figures(condition, rank, residual if residual < math.inf > condition else math.inf, bound)
        for condition, rank, residual, bound in figures
    ]


def _gram(factor_BNN: Floats, out_BNN: Floats) -> None:
    """Write the upper triangle of F^T F of each F to out_BNN; up to n = 128 both, exactly symmetric."""
    if factor_BNN.shape[1] <= FULL_UP_TO:
        # numpy sees that both operands are the same memory, calls xSYRK and mirrors in one pass. Where it is
        # built without BLAS it sums both triangles in the same order.
        np.matmul(factor_BNN.transpose(0, 2, 1), factor_BNN, out=out_BNN)
        return
    for factor_NN, out_NN in zip(factor_BNN, out_BNN, strict=True):
        blas.dsyrk(1.0, factor_NN.T, c=out_NN.T, lower=1, overwrite_c=1)


def _residuals(
    of: _Decomposed, ridge_B1: Floats, kept_BN: NDArray[np.bool_] | None, order: Order
) -> list[float]:
    count, n = of.values_BN.shape
    clips = bool((of.values_BN[:, 0] < 0.0).any())

    matrices = functools.cache(of.matrices)

    def apply_b(rows_BKN: Floats) -> Floats:
        known = kept_BN is None and rows_BKN is start_BKN
        product_BKN = of.probed_BKN.copy() if known else multiply(matrices(), rows_BKN)
        product_BKN += ridge_B1[:, :, None] * rows_BKN
        if clips:
            product_BKN -= project(rows_BKN, of.vectors_BNN, np.minimum(of.values_BN, 0.0))
        return product_BKN

    start_BKN = probes_of(count, n)
    if kept_BN is not None:
        start_BKN = project(start_BKN, of.vectors_BNN, kept_BN.astype(np.float64))
    return residuals(apply_b, lambda rows_BKN: multiply(of.root_BNN, rows_BKN), order, start_BKN)
