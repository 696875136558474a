"""Refreshing a block less often while its factors stay the same (SP-NGD, arXiv 2002.06015, section 4.3).

Two matrices are similar when ``||X - Y||_F / ||Y||_F < 0.1``. At a refresh X is compared with what was taken
at the last refresh, X_-1, and at the one before, X_-2:

    X unlike X_-1              interval = max(1, floor(last interval / 2))
    X like X_-1, unlike X_-2   interval = last interval
    X like both                interval = last interval + the one before it
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class AdaptiveRefresh:
    """Intervals between the snapshots of a block that follow how fast its factors change.

    Intervals are counted in the ``refresh_every`` of the :class:`StalenessConfig` (its least interval where
    that is None), and end at half of ``max_staleness``, so that a block is taken again before it is too old.
    A block is similar if both of its factors are. Keeps the factors of the last two snapshots, as much memory
    again as twice the statistics. A resumed run begins with the least interval.

    Attributes:
        similar_below: relative difference in the Frobenius norm below which two factors are similar, > 0.
    """

    similar_below: float = 0.1

    def __post_init__(self) -> None:
        if not (self.similar_below > 0 and math.isfinite(self.similar_below)):
            raise ValueError(f"similar_below must be finite and > 0, not {self.similar_below}")


@dataclass(slots=True)
class Similarity:
    """What a comparison of some blocks of a stack has shown.

    Attributes:
        rows: of the stack.
        known: how many earlier snapshots there were of each.
        verdicts: (2, rows) bool on the host: like the last, like the one before.
        ready: after which ``verdicts`` may be read; None: now.
    """

    rows: tuple[int, ...]
    known: tuple[int, ...]
    verdicts: torch.Tensor
    ready: torch.cuda.Event | None


def is_similar(now: torch.Tensor, before: torch.Tensor, similar_below: float) -> torch.Tensor:
    """For each matrix of (b, n, n) whether ``||X - Y||_F / ||Y||_F < similar_below``: (b,) bool."""
    difference = torch.linalg.matrix_norm(now - before)
    result: torch.Tensor = difference < similar_below * torch.linalg.matrix_norm(before)
    return result


def next_interval(last: int, before: int, like_last: bool, like_before: bool) -> int:
    """The rule above, for intervals >= 1."""
    if not like_last:
        return max(1, last // 2)
    return last + before if like_before else last


class Intervals:
    """The interval of every block, and the one before it.

    Args:
        unit: steps that the least interval has.
        longest: steps that no interval exceeds but the least.
    """

    def __init__(self, unit: int, longest: int) -> None:
        self._unit = unit
        self._longest = max(1, longest // unit)
        self._last: list[int] = []
        self._before: list[int] = []

    def extend(self, blocks: int) -> None:
        """Have the least interval for blocks that were added."""
        new = blocks - len(self._last)
        self._last += [1] * new
        self._before += [1] * new

    def refreshed(self, block: int, known: int, like_last: bool, like_before: bool) -> int:
        """The steps to a block's next snapshot.

        Args:
            block: that was taken.
            known: how many earlier snapshots there are.
            like_last: similar to the last one.
            like_before: similar to the one before.
        """
        last = self._last[block]
        new = min(
            next_interval(last, self._before[block], like_last and known > 0, like_before and known > 1),
            self._longest,
        )
        self._before[block], self._last[block] = last, new
        return new * self._unit
