"""Which method is faster on this host, for a size, an order and a condition: measured, not assumed.

Both methods are cubic. Newton's method is a known number of matrix products, so what has to be measured is
one decomposition against one product, for each size class on this host with the threads that BLAS has now.
That ratio changes with the size (small products are fast, small decompositions are not), with the BLAS
library and with its threads; nothing about it can be taken from a publication.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from . import spectrum
from .conditioning import AbsoluteRidge, Conditioning, RelativeRidge, TraceRidge
from .order import Order

SIZES = (16, 32, 64, 128, 256, 512)
"""Size classes. A larger matrix is taken to behave as 512 does."""
_REPEATS = 3
_FINAL_ITERATIONS = 6
_UNKNOWN_CONDITION = 1e6


@dataclass(frozen=True)
class Timing:
    """Seconds of the calling thread on this host, best of three."""

    n: int
    eigh: float
    product: float


_timings: dict[int, Timing] = {}
_lock = threading.Lock()


def calibrate() -> tuple[Timing, ...]:
    """Measure every size class that was not measured yet, some 0.2 s in all, and return the timings.

    Thread-safe; measured once per process. Bind BLAS threads first.
    """
    return tuple(_timing(n) for n in SIZES)


def choose(n: int, order: Order, conditioning: Conditioning) -> Literal["eigh", "schur_newton"]:
    """Return the method that is expected to be faster on this host; eigh where only that applies."""
    if conditioning.truncates:
        return "eigh"
    timing = _timing(next((size for size in SIZES if n <= size), SIZES[-1]))
    newton = newton_products(order, _likely_condition(n, conditioning)) * timing.product
    return "eigh" if timing.eigh + timing.product / 2 <= newton else "schur_newton"


def newton_products(order: Order, condition: float) -> float:
    """Return how many matrix products the coupled Newton iteration takes to converge.

    Small eigenvalues grow by ((m + 1) / m)^m a step until they reach 1; half a dozen quadratic steps
    follow. A step is the power T^m by repeated squaring and two products more.
    """
    m = order.numerator
    growth = m * math.log1p(1.0 / m)
    iterations = math.log(condition) / growth + _FINAL_ITERATIONS
    power = m.bit_length() - 1 + m.bit_count() - 1
    return iterations * (power + 2) + order.denominator - 1


def _likely_condition(n: int, conditioning: Conditioning) -> float:
    match conditioning:
        case RelativeRidge(epsilon) if epsilon > 0:
            return 1.0 + 1.0 / epsilon
        case TraceRidge(epsilon) if epsilon > 0:
            return 1.0 + n / epsilon
        case AbsoluteRidge() | _:
            return _UNKNOWN_CONDITION


def _timing(size: int) -> Timing:
    with _lock:
        timing = _timings.get(size)
        if timing is None:
            timing = _timings[size] = _measure(size)
        return timing


def _measure(n: int) -> Timing:
    gradient = np.random.default_rng(n).standard_normal((n, n))
    statistics = gradient @ gradient.T
    return Timing(
        n,
        _best(lambda: spectrum.decompose(statistics.copy())),
        _best(lambda: statistics @ gradient),
    )


def _best(function: Callable[[], object]) -> float:
    # CPU time: on a busy host the longer of two functions is interrupted more often, and would look slower.
    # The calling thread takes part in all that BLAS does with more threads.
    seconds = math.inf
    for _ in range(_REPEATS):
        began = time.thread_time()
        function()
        seconds = min(seconds, time.thread_time() - began)
    return seconds
