"""The order p of an inverse root, as an exact fraction."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache
from numbers import Rational
from typing import NamedTuple

from .errors import OrderError

LARGEST_TERM = 1024
"""Numerators and denominators beyond this are refused: verification multiplies that often."""

_FLOAT_ULPS = 4


class Order(NamedTuple):
    """p = numerator / denominator > 0, in lowest terms."""

    numerator: int
    denominator: int

    @property
    def exponent(self) -> float:
        """-1/p."""
        return -self.denominator / self.numerator


def as_order(p: float | Rational) -> Order:
    """Return p in lowest terms.

    A float such as 4/3 stands for the simplest fraction that rounds to it.

    Raises:
        OrderError: p is not positive and finite, or no fraction with terms up to 1024 is within four
            units in the last place of it.
    """
    if isinstance(p, bool) or not isinstance(p, (int, float, Rational)):
        raise OrderError(f"p must be an int, a float or a Fraction, not {type(p).__name__}")
    if isinstance(p, float) and not math.isfinite(p):
        raise OrderError(f"p = {p} is not finite; the matrices of a 2-D block need p = 4")
    return _reduced(p if isinstance(p, float) else Fraction(p))


# Fractions are slow, and a process asks for few orders. Typed, as a float is not the fraction that it equals.
@lru_cache(maxsize=64, typed=True)
def _reduced(p: float | Fraction) -> Order:
    if p <= 0:
        raise OrderError(f"p = {p} is not positive; the matrices of a 2-D block need p = 4")
    if isinstance(p, float):
        order = Fraction(p).limit_denominator(LARGEST_TERM)
        if abs(float(order) - p) > _FLOAT_ULPS * math.ulp(p):
            raise OrderError(
                f"p = {p!r} is no fraction with terms up to {LARGEST_TERM}; pass such a Fraction"
            )
    else:
        order = p
    if not 0 < order.numerator <= LARGEST_TERM or order.denominator > LARGEST_TERM:
        raise OrderError(f"p = {p} has a term beyond {LARGEST_TERM}; use a nearby simpler fraction")
    return Order(order.numerator, order.denominator)
