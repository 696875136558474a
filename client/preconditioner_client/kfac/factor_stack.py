"""Blocks whose statistics are the Kronecker factors of layers, and how they are damped.

The damped inverse of arXiv 1503.05671, section 6.3, and arXiv 1811.12019 is

    (G + sqrt(l) / pi I)^-1 dW (A + pi sqrt(l) I)^-1,    pi = sqrt((tr A / dim A) / (tr G / dim G))

where pi changes with every snapshot, while a session fixes the ridge of a block. So the factors are scaled
instead: ``pi G`` and ``A / pi`` leave, with the absolute ridge ``sqrt(l)`` and exponent 1. What comes back is

    (pi G + sqrt(l) I)^-1 = (G + sqrt(l) / pi I)^-1 / pi
    (A / pi + sqrt(l) I)^-1 = pi (A + pi sqrt(l) I)^-1

whose scales cancel in the product. Nothing but the two matrices has to be kept of a version.

An embedding's ``A`` is a diagonal and never leaves: it is inverted where it is, with the pi of the moment.
Its mean is 1 / V, since every example has one index. So while pi changes from a version to the step that uses
it, its direction has that ratio more or less of length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from preconditioner_client.blocks import BlockSlice, Partition, row_major
from preconditioner_client.config import StatisticsConfig
from preconditioner_client.guard import Guard
from preconditioner_client.kfac.adaptive_refresh import Similarity, is_similar
from preconditioner_client.plan import GroupSettings
from preconditioner_client.stack import BlockStack, Member, Taken, chosen
from preconditioner_client.transfer import to_host

MATRIX, EMBEDDING, PLAIN = "matrix", "embedding", "plain"


@dataclass(frozen=True, kw_only=True)
class LayerSettings(GroupSettings):
    """What the layers of a group are cut into.

    Attributes:
        kinds: for each parameter of the group ``matrix`` or ``embedding`` if it is the weight of such a
            layer, else ``plain``.
        similar_below: see :class:`AdaptiveRefresh`; None without.
    """

    kinds: tuple[str, ...]
    similar_below: float | None

    def cut(self, index: int, shape: tuple[int, ...], rows: tuple[int, int] | None) -> Partition:
        """A layer's matrix in pieces of at most ``block_size`` a side; a table's rows stay together."""
        kind = self.kinds[index]
        if kind == PLAIN:
            return Partition(shape, (), ())
        size = self.blocking.block_size
        sizes = (shape[0] if kind == EMBEDDING else size, size)
        return Partition(shape, (1,) if kind == EMBEDDING else (0, 1), row_major(shape, sizes))

    def stack(
        self, members: Sequence[Member], preconditioned: tuple[int, ...], device: torch.device
    ) -> BlockStack:
        """See :class:`FactorStack`."""
        return FactorStack(members, preconditioned, self.statistics, device, self.similar_below)


def sides_of(place: BlockSlice, output: torch.Tensor, inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A block's part of its layer's factors: ``G`` and ``A``, or of an embedding ``G`` alone."""
    if inputs.ndim == 1:
        columns = place.slices[1]
        return (output[columns, columns],)
    rows, columns = place.slices
    return output[rows, rows], inputs[columns, columns]


class FactorStack(BlockStack):
    """Blocks of layers; their statistics are given instead of made from gradients."""

    def __init__(
        self,
        members: Sequence[Member],
        preconditioned: tuple[int, ...],
        statistics: StatisticsConfig,
        device: torch.device,
        similar_below: float | None = None,
    ) -> None:
        super().__init__(members, preconditioned, statistics, device)
        self._similar_below = similar_below
        kept = self.statistics if similar_below is not None else []
        # The factors of the last two snapshots, the newer first: per side (B, n, n).
        self._taken = [[torch.zeros_like(side) for side in kept] for _ in range(2)]
        self._snapshots = [0] * len(self)
        self.similarities: list[Similarity] = []
        """Not yet looked at, see :mod:`preconditioner_client.kfac.adaptive_refresh`."""

    def fold(
        self, rows: Sequence[int], sides: Sequence[Sequence[torch.Tensor]], guard: Guard | None = None
    ) -> None:
        """``S <- beta S + (1 - beta) X``.

        A factor that is not finite leaves its statistics as they were: unlike gradients it is not the same on
        all replicas, so that nobody can be told to stop.

        Args:
            rows: the blocks, increasing.
            sides: for each row the new factors, one for each side.
            guard: the verdict on the step's gradients, where the host does not know it.
        """
        index = self.index_of(rows)
        beta = self.config.beta
        for number, statistics in enumerate(self.statistics):
            new = torch.stack([of_row[number] for of_row in sides]).to(self.device)
            part = chosen(statistics, index)
            good = new.sum((1, 2)).isfinite()
            if guard is not None:
                good = good & guard.bad.logical_not()
            mixed = torch.where(good[:, None, None], torch.lerp(part, new, 1 - beta), part)
            if isinstance(index, torch.Tensor):
                statistics.index_copy_(0, index, mixed)
            else:
                part.copy_(mixed)
        for row in rows:
            self.updates[row] += 1

    def pi(self, rows: Sequence[int]) -> torch.Tensor:
        """How damping is split between the factors as they are, (len(rows),); 1 if one of them is 0."""
        index = self.index_of(rows)
        means = [chosen(s, index).diagonal(dim1=1, dim2=2).mean(1) for s in self.statistics]
        if (corrections := self.corrections(rows)) is not None:
            means = [mean * corrections for mean in means]
        output = means[0]
        inputs = means[1] if len(means) == 2 else torch.full_like(output, 1 / self.shape[0])
        ratio = (inputs / output).sqrt()
        return torch.where((inputs > 0) & (output > 0) & ratio.isfinite(), ratio, 1.0)

    def snapshot(self, rows: Sequence[int]) -> Taken:
        """As that of any stack, scaled by pi; and compared with the last ones where that is asked for."""
        if self._similar_below is not None:
            self._compare(rows)
        return super().snapshot(rows)

    def _scales(self, rows: Sequence[int]) -> Sequence[torch.Tensor | None]:
        pi = self.pi(rows)
        corrections = self.corrections(rows)
        scales = (pi, 1 / pi)[: len(self.sides)]
        return [scale if corrections is None else scale * corrections for scale in scales]

    def _compare(self, rows: Sequence[int]) -> None:
        assert self._similar_below is not None
        index = self.index_of(rows)
        corrections = self.corrections(rows)
        verdicts = torch.ones(2, len(rows), dtype=torch.bool, device=self.device)
        for number, statistics in enumerate(self.statistics):
            now = chosen(statistics, index)
            if corrections is not None:
                now = now * corrections[:, None, None]
            before = [chosen(self._taken[age][number], index) for age in range(2)]
            for age in range(2):
                verdicts[age] &= is_similar(now, before[age], self._similar_below)
            for age, newer in ((1, before[0]), (0, now)):
                self._taken[age][number][index] = newer
        known = tuple(self._snapshots[row] for row in rows)
        self.similarities.append(Similarity(tuple(rows), known, *to_host(verdicts)))
        for row in rows:
            self._snapshots[row] += 1
