"""Inverse p-th roots of symmetric positive semi-definite matrices, verified before they are returned."""

from __future__ import annotations

import math
import time
from numbers import Rational
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from . import by_eigh, by_newton
from .by_newton import ClippingError
from .calibration import choose
from .conditioning import Conditioning, RelativeRidge
from .errors import DtypeError, InputError, MethodError, RootError
from .inputs import as_stack, prepare
from .order import Order, as_order
from .result import Method, Root
from .unscale import diagnostics, unscale

_CHUNK_ELEMENTS = 1 << 19
"""Of the matrices that are worked on together (4 MiB in float64), so that what Python costs is shared."""
_MOST_RETRIES = 16
"""By then a ridge has grown from rounding to the whole matrix."""
_DEFAULT = RelativeRidge()


def inverse_root(
    matrix: ArrayLike,
    p: float | Rational,
    *,
    conditioning: Conditioning = _DEFAULT,
    method: Method = "auto",
    dtype: DTypeLike = np.float32,
    residual_bound: float | None = None,
    retries: int = 3,
) -> Root:
    """Return X = B^(-1/p), B being the conditioned matrix, computed in float64 and verified.

    Args:
        matrix: (n, n), or its upper triangle row by row, (n (n + 1) / 2,); float32 or float64. Never
            written to.
        p: any positive rational: 2k for Shampoo with k preconditioned sides, 1 for K-FAC, also 4/3.
        conditioning: how B is made from the matrix, see `preconditioner_service.roots.conditioning`.
        method: eigh, schur_newton, or auto: the faster one of those that apply, as measured on this host.
            schur_newton does not clip, see `preconditioner_service.roots.by_newton`; auto leaves a matrix
            where that would show in the root to eigh.
        dtype: of the result, float32 or float64.
        residual_bound: largest acceptable `||X^a B^b v - v|| / ||v||`, p = a/b, of the float64 root; by
            default what rounding explains, see `verification.default_bound`.
        retries: how many times the ridge or threshold may be multiplied by ten to meet that bound.

    Raises:
        InputError: no symmetric matrix, order or method (ShapeError, EmptyError, DtypeError, OrderError,
            MethodError).
        NotFiniteError: the matrix holds NaN or infinity.
        AsymmetricError: it differs from its transpose by more than rounding.
        IndefiniteError: it has an eigenvalue below zero by more than rounding.
        RangeError: the root does not fit the range of the dtype.
        ResidualError: no root within the bound after all retries.
    """
    outcome = inverse_roots(
        np.asarray(matrix)[None],
        p,
        conditioning=conditioning,
        method=method,
        dtype=dtype,
        residual_bound=residual_bound,
        retries=retries,
    )[0]
    if isinstance(outcome, RootError):
        raise outcome
    return outcome


def inverse_roots(
    stack: ArrayLike,
    p: float | Rational,
    *,
    conditioning: Conditioning = _DEFAULT,
    method: Method = "auto",
    dtype: DTypeLike = np.float32,
    residual_bound: float | None = None,
    retries: int = 3,
) -> list[Root | RootError]:
    """Return what `inverse_root` returns or raises for each matrix of a stack, in order.

    Many small matrices cost little more than their decompositions this way. One bad matrix does not spoil the
    others: its error stands in its place.

    Args:
        stack: (b, n, n), or (b, n (n + 1) / 2) upper triangles row by row; float32 or float64.
        p: as for `inverse_root`, and so are all others.
        conditioning: see `inverse_root`.
        method: see `inverse_root`.
        dtype: see `inverse_root`.
        residual_bound: see `inverse_root`.
        retries: see `inverse_root`.

    Raises:
        InputError: what is wrong with the arguments, and so with every matrix.
    """
    order = as_order(p)
    array, n = as_stack(stack)
    try:
        out = np.dtype(dtype)
    except TypeError:
        raise DtypeError(f"output dtype {dtype!r} is neither float32 nor float64") from None
    if out not in (np.float32, np.float64):
        raise DtypeError(f"output dtype {out} is neither float32 nor float64")
    if not isinstance(conditioning, Conditioning):
        raise InputError(
            f"conditioning must be a Conditioning, such as RelativeRidge(1e-6), not {conditioning!r}"
        )
    if not isinstance(retries, int) or not 0 <= retries <= _MOST_RETRIES:
        raise InputError(f"retries = {retries!r} must be an int from 0 to {_MOST_RETRIES}")
    if residual_bound is not None and not isinstance(residual_bound, (int, float)):
        raise InputError(f"residual_bound = {residual_bound!r} must be a number in [0, 1), or None")
    if residual_bound is not None and not 0 <= residual_bound < 1:
        raise InputError(
            f"residual_bound = {residual_bound} must be in [0, 1): 1 is the residual of a zero root"
        )
    if method not in ("auto", "eigh", "schur_newton"):
        raise MethodError(f"method {method!r} is none of auto, eigh, schur_newton")
    chosen = method
    if chosen == "auto":
        chosen = choose(n, order, conditioning)
    size = max(1, _CHUNK_ELEMENTS // (n * n))
    results: list[Root | RootError] = []
    # What overflows or is undefined on the way is never returned: a check of its own sees to that.
    with np.errstate(all="ignore"):
        for start in range(0, len(array), size):
            chunk = array[start : start + size]
            outcomes = _chunk(
                chunk, n, order, conditioning, chosen, out, residual_bound, retries, clips=method == "auto"
            )
            clipped = [i for i, outcome in enumerate(outcomes) if isinstance(outcome, ClippingError)]
            if clipped:
                again = _chunk(chunk[clipped], n, order, conditioning, "eigh", out, residual_bound, retries)
                for i, outcome in zip(clipped, again, strict=True):
                    outcomes[i] = outcome
            results += outcomes
    return results


def _chunk(
    chunk: NDArray[Any],
    n: int,
    order: Order,
    conditioning: Conditioning,
    method: Literal["eigh", "schur_newton"],
    dtype: np.dtype[Any],
    residual_bound: float | None,
    retries: int,
    clips: bool = False,
) -> list[Root | RootError]:
    began = time.perf_counter()
    prepared = prepare(chunk, n, conditioning.floor)
    if method == "eigh":
        root_BNN, outcomes = by_eigh.solve(prepared, order, conditioning, residual_bound, retries)
    else:
        clipping = float(np.finfo(dtype).eps) if clips else math.inf
        root_BNN, outcomes = by_newton.solve(prepared, order, conditioning, residual_bound, retries, clipping)
    results: dict[int, Root | RootError] = dict(prepared.errors)
    for k, outcome in enumerate(outcomes):
        if isinstance(outcome, RootError):
            root_BNN[k] = 0.0
    matrix_BNN, misfits = unscale(root_BNN, prepared.exponents, order, dtype)
    seconds = (time.perf_counter() - began) / len(chunk)
    for k, i in enumerate(prepared.index):
        outcome = misfits.get(k, outcomes[k])
        if isinstance(outcome, RootError):
            results[i] = outcome
        else:
            figures = diagnostics(outcome, prepared.exponents[k], conditioning.truncates, method, seconds)
            results[i] = Root(matrix_BNN[k], figures)
    return [results[i] for i in range(len(chunk))]
