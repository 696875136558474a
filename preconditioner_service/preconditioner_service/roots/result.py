"""What a computed root comes with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from numpy.typing import NDArray

Method = Literal["auto", "eigh", "schur_newton"]


@dataclass(frozen=True)
class Diagnostics:
    """How a root was computed and how good it is. Eigenvalues and ridges are in the statistics' units."""

    method: Literal["eigh", "schur_newton"]
    iterations: int
    """Of Newton's method; 0 for a decomposition."""
    smallest_eigenvalue: float
    """Of the statistics, before clipping; an upper bound, close, if the method is schur_newton."""
    largest_eigenvalue: float
    """Of the statistics; a Lanczos value (a lower bound, close) if the method is schur_newton."""
    condition: float
    """Effective: largest over smallest eigenvalue of B, of those kept; from below with schur_newton."""
    ridge: float
    """Added to every eigenvalue, after retries; 0 with a pseudo-inverse."""
    threshold: float
    """Up to which eigenvalues were dropped, after retries; 0 without a pseudo-inverse."""
    rank: int
    """Eigenvalues kept: n unless the conditioning is a pseudo-inverse."""
    residual: float
    """Largest `||X^a B^b v - v|| / ||v||` over the probes v, p = a/b, of the float64 root."""
    residual_bound: float
    """What `residual` had to stay within."""
    retries: int
    """How many times the ridge or threshold was multiplied by ten, from the level of rounding if below."""
    seconds: float
    """Wall time; of a batch, an equal share of it."""


@dataclass(frozen=True, eq=False)
class Root:
    """An inverse root X = B^(-1/p), (n, n), exactly symmetric, and how it came about."""

    matrix: NDArray[Any]
    diagnostics: Diagnostics
