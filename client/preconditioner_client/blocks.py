"""Cutting a parameter into blocks: merging of small dimensions, splitting of long ones.

The dimensions of a parameter are first merged (``(64, 32, 3, 3) -> (64, 288)``), then every dimension longer
than ``block_size`` is split, so that a block has at most ``block_size`` along each preconditioned side. A
dimension longer than ``max_side`` is left whole and without a preconditioner.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from preconditioner_client.config import BlockingConfig


@dataclass(frozen=True, slots=True)
class BlockSlice:
    """One block of a parameter.

    Attributes:
        start: first index along each merged dimension.
        shape: lengths along each merged dimension.
    """

    start: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def slices(self) -> tuple[slice, ...]:
        """Index of the block in the merged tensor."""
        return tuple(slice(s, s + n) for s, n in zip(self.start, self.shape, strict=True))

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def key(self, origin: int = 0) -> str:
        """The slice as text: ``0:512,0:512``; ``origin`` is added along the first dimension."""
        starts = (self.start[0] + origin, *self.start[1:])
        return ",".join(f"{s}:{s + n}" for s, n in zip(starts, self.shape, strict=True))


@dataclass(frozen=True, slots=True)
class Partition:
    """How one parameter is cut.

    Attributes:
        merged: shape of the parameter after merging; a view of it.
        preconditioned: the merged dimensions that have a preconditioner.
        blocks: row-major over the merged tensor; empty if nothing is preconditioned.
        origin: where the merged tensor's first dimension begins in the whole parameter's; 0 unless these are
            only some of its rows.
    """

    merged: tuple[int, ...]
    preconditioned: tuple[int, ...]
    blocks: tuple[BlockSlice, ...]
    origin: int = 0


def merge_dims(shape: tuple[int, ...], limit: int) -> tuple[int, ...]:
    """Merge neighbouring dimensions, last ones first, while their product is at most ``limit``.

    Dimensions of length 1 disappear. A tensor with two or more longer dimensions keeps at least two: a
    matrix stays a matrix, and a kernel ``(out, in, h, w)`` becomes ``(out, in h w)`` if that fits.
    """
    rest = [n for n in shape if n != 1]
    if len(rest) <= 2:
        return tuple(rest) or (1,)
    merged = [rest[-1]]
    for position in range(len(rest) - 2, -1, -1):
        dims_left = position + len(merged)
        if merged[0] * rest[position] <= limit and dims_left >= 2:
            merged[0] *= rest[position]
        else:
            merged.insert(0, rest[position])
    return tuple(merged)


def partition(
    shape: tuple[int, ...], config: BlockingConfig, rows: tuple[int, int] | None = None
) -> Partition:
    """Cut a parameter of the given shape, or some of its rows.

    Parameters with fewer than two dimensions longer than 1, and empty ones, have no blocks: they are the
    diagonal method's.

    Args:
        shape: of the whole parameter. It alone decides what is merged and which dimensions are
            preconditioned, so that a block means the same whatever shard it lies in.
        config: how to cut.
        rows: first and one past the last index along dimension 0; ``merged`` and ``blocks`` are those of
            these rows, and cutting begins at the first of them. None: all.
    """
    whole = (
        merge_dims(shape, config.block_size)
        if config.merge_dims
        else (tuple(n for n in shape if n != 1) or (1,))
    )
    limit = math.inf if config.max_side is None else config.max_side
    preconditioned = tuple(i for i, n in enumerate(whole) if n <= limit)
    merged, origin = whole, 0
    if rows is not None and shape and shape[0] > 0:
        per_row = whole[0] // shape[0]
        merged, origin = ((rows[1] - rows[0]) * per_row, *whole[1:]), rows[0] * per_row
    if len(merged) < 2 or not preconditioned or 0 in shape or merged[0] == 0:
        return Partition(merged, (), (), origin)
    sizes = [config.block_size if m <= limit else n for n, m in zip(merged, whole, strict=True)]
    return Partition(merged, preconditioned, row_major(merged, sizes), origin)


def row_major(shape: Sequence[int], sizes: Sequence[int]) -> tuple[BlockSlice, ...]:
    """Blocks of at most these sizes that together are a tensor of this shape."""
    cuts = [_cut(n, size) for n, size in zip(shape, sizes, strict=True)]
    return tuple(
        BlockSlice(tuple(start for start, _ in piece), tuple(length for _, length in piece))
        for piece in itertools.product(*cuts)
    )


def _cut(length: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(size, length - start)) for start in range(0, length, size)]
