"""Exchanges of the control runs: roots in process, and then withheld or made useless.

Each is a :class:`preconditioner_client.LocalExchange`, so that a control differs from the arms in nothing but
what its name says.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from preconditioner_client import LocalExchange
from preconditioner_client.exchange import Arrival, Rejection, Snapshot


class NothingExchange(LocalExchange):
    """Answers no snapshot: every block takes the grafted diagonal step for ever."""

    def offer(self, snapshots: Sequence[Snapshot], step: int) -> None:
        """Drop them."""


class FirstOnlyExchange(LocalExchange):
    """Answers each block's first snapshot and no other: the preconditioner is frozen for ever."""

    def __init__(self, delay: int = 0) -> None:
        super().__init__(delay)
        self._answered: set[int] = set()

    def offer(self, snapshots: Sequence[Snapshot], step: int) -> None:
        """Pass the first of each block on."""
        first = [snapshot for snapshot in snapshots if snapshot.block not in self._answered]
        self._answered.update(snapshot.block for snapshot in first)
        super().offer(first, step)


class LateExchange(LocalExchange):
    """Answers no snapshot before a step, and every one from then on.

    What A(N) loses by its late beginning alone, without any staleness.

    Args:
        begin: first step that has a preconditioner.
    """

    def __init__(self, begin: int) -> None:
        super().__init__()
        self._begin = begin

    def offer(self, snapshots: Sequence[Snapshot], step: int) -> None:
        """Pass on what is late enough."""
        if step >= self._begin:
            super().offer(snapshots, step)


class RotatedExchange(LocalExchange):
    """``Q P Qᵀ`` in place of each preconditioner P, with a random orthogonal Q fixed per block and side.

    A random symmetric positive definite matrix with the very spectrum of the right one: what fails with it
    fails for want of directions, not of scale. Q is uniform (Haar), by QR with the signs of R's diagonal.
    """

    def __init__(self, seed: int, delay: int = 0) -> None:
        super().__init__(delay)
        self._seed = seed
        self._rotations: dict[tuple[int, int], torch.Tensor] = {}

    def collect(self, step: int) -> list[Arrival | Rejection]:
        """What has arrived, rotated."""
        return [self._rotated(event) for event in super().collect(step)]

    def _rotated(self, event: Arrival | Rejection) -> Arrival | Rejection:
        if isinstance(event, Rejection):
            return event
        sides = []
        for number, side in enumerate(event.sides):
            q = self._rotation(event.block, number, side.shape[0])
            turned = q @ side.to(torch.float64) @ q.T
            sides.append(((turned + turned.T) / 2).to(torch.float32))
        return Arrival(event.block, event.step, tuple(sides))

    def _rotation(self, block: int, side: int, n: int) -> torch.Tensor:
        if (block, side) not in self._rotations:
            normal = np.random.default_rng((self._seed, block, side)).standard_normal((n, n))
            q, r = np.linalg.qr(normal)
            self._rotations[block, side] = torch.from_numpy(q * np.sign(np.diagonal(r)))
        return self._rotations[block, side]
