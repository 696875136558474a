"""How a spectrum is conditioned before its root is taken.

Statistics are singular in exact arithmetic (fewer gradients than dimensions) and indefinite in rounding.
Each conditioning turns the eigenvalues d of A, first clipped at zero, into those of the matrix B whose root
is taken. `largest` below is the largest eigenvalue of A and `mean` is trace(A) / n.

A zero matrix has no scale of its own. Where a conditioning is relative to one, the scale 1 stands in
for it, so that the root of a zero matrix is `epsilon^(-1/p) I`: finite, and a multiple of the identity,
which preconditions nothing, as is right for a block that has not seen a gradient yet.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from .errors import InputError

Floats = NDArray[np.float64]


class Conditioning(ABC):
    """Turns the eigenvalues of A into those of the matrix B whose root is taken."""

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise InputError(f"{type(self).__name__}.{field.name} must be a number, not {value!r}")
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"{type(self).__name__}.{field.name} = {value} must be finite and >= 0")

    @abstractmethod
    def level(self, largest: float, mean: float, exponent: int) -> float:
        """The ridge, or the threshold of a pseudo-inverse, of a scaled matrix.

        Args:
            largest: eigenvalue of `A 2^-exponent`, clipped at zero.
            mean: trace of `A 2^-exponent` divided by n, clipped at zero.
            exponent: the power of two that was taken out.
        """

    @property
    def truncates(self) -> bool:
        """Whether eigenvalues up to the level are dropped, instead of all being raised by it."""
        return False

    @property
    def floor(self) -> float:
        """The smallest scale of a matrix beside which this conditioning does not overflow."""
        return 0.0


@dataclass(frozen=True)
class RelativeRidge(Conditioning):
    """`B = A + epsilon * largest(A) I`: the condition of B is at most 1 + 1/epsilon.

    Source: the published implementation of Scalable Second Order Optimization (arXiv 2002.09018), with the
    largest eigenvalue itself in place of an estimate from power iteration.
    """

    epsilon: float = 1e-6

    def level(self, largest: float, mean: float, exponent: int) -> float:
        """See `Conditioning.level`."""
        return self.epsilon * (largest or 1.0)


@dataclass(frozen=True)
class AbsoluteRidge(Conditioning):
    """`B = A + ridge I`, whatever the scale of A.

    Source: Shampoo (arXiv 1802.09568), algorithm 1, where statistics start at `epsilon I`.
    """

    ridge: float

    def level(self, largest: float, mean: float, exponent: int) -> float:
        """See `Conditioning.level`."""
        return math.ldexp(self.ridge, -exponent)

    @property
    def floor(self) -> float:
        """See `Conditioning.floor`."""
        return self.ridge


@dataclass(frozen=True)
class TraceRidge(Conditioning):
    """`B = A + epsilon * trace(A) / n I`: damping in proportion to the mean eigenvalue.

    Source: factored damping in K-FAC (arXiv 1503.05671, section 6.3; arXiv 1811.12019), which splits
    a damping lambda over two factors by the ratio of their mean eigenvalues m_A and m_G. With
    `epsilon = sqrt(lambda / (m_A m_G))` for both factors this is that split.
    """

    epsilon: float

    def level(self, largest: float, mean: float, exponent: int) -> float:
        """See `Conditioning.level`."""
        return self.epsilon * (mean or 1.0)


@dataclass(frozen=True)
class PseudoInverse(Conditioning):
    """No ridge: eigenvalues not above `threshold * largest(A)` count as zero, and so does their root.

    The root is `(A^+)^(1/p)` of the truncated A (Moore and Penrose). Directions that the statistics have
    never seen get no update, instead of the largest one. A zero matrix has a zero root.
    """

    threshold: float

    def __post_init__(self) -> None:
        """Check the threshold.

        Raises:
            InputError: it is not in [0, 1).
        """
        super().__post_init__()
        if self.threshold >= 1:
            raise InputError(
                f"PseudoInverse.threshold = {self.threshold} must be below 1, else nothing remains"
            )

    def level(self, largest: float, mean: float, exponent: int) -> float:
        """See `Conditioning.level`."""
        return self.threshold * largest

    @property
    def truncates(self) -> bool:
        """See `Conditioning.truncates`."""
        return True
