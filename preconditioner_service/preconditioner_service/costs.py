"""How long a block's roots will take: c n^3 summed over its sides, with c learnt from measured seconds.

The time of a decomposition is not quite cubic (small matrices are bound by calls, large ones by memory), so
every range of n between two powers of two has a c of its own.
"""

from __future__ import annotations

from collections.abc import Iterable

_CALL_SECONDS = 5e-5
"""What a root costs however small it is."""

_INITIAL = 3e-10
"""c before anything was measured: seconds per n^3 of an eigendecomposition and its product, one core."""

_WEIGHT = 0.2
"""Of a new measurement in the moving average."""


class CostModel:
    """Seconds of one worker per block, corrected by what was measured."""

    def __init__(self) -> None:
        self._c: dict[int, float] = {}

    def estimate(self, lengths: Iterable[int]) -> float:
        """Seconds that the roots of sides of these lengths will take."""
        return sum(_CALL_SECONDS + self._coefficient(n) * n**3 for n in lengths)

    def observe(self, length: int, seconds: float) -> None:
        """Learn from one root. Measurements that are not positive are ignored."""
        if not seconds > 0:
            return
        measured = max(seconds - _CALL_SECONDS, 0.1 * seconds) / length**3
        size = length.bit_length()
        known = self._c.get(size)
        self._c[size] = measured if known is None else known + _WEIGHT * (measured - known)

    def _coefficient(self, length: int) -> float:
        if not self._c:
            return _INITIAL
        size = length.bit_length()
        return self._c[min(self._c, key=lambda known: (abs(known - size), known))]
