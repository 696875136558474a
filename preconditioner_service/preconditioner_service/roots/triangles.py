"""Symmetric storage: packed upper triangles, mirroring, and how far a matrix is from its transpose.

A transposed pass over a large matrix misses the cache at every element, so all of these go by tiles.
Packed order is that of the wire: the upper triangle row by row, a00 a01 .. a0n a11 .. ann.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .conditioning import Floats

_TILE = 128
"""Two float64 tiles of 128 x 128 take 256 KiB and stay in a second-level cache."""


def unpack(packed_BP: NDArray[Any], out_BNN: Floats) -> None:
    """Write packed upper triangles into the upper triangles of out_BNN; the rest becomes zero."""
    n = out_BNN.shape[1]
    start = 0
    for row in range(n):
        out_BNN[:, row, :row] = 0.0
        out_BNN[:, row, row:] = packed_BP[:, start : start + n - row]
        start += n - row


def pack(matrix_NN: NDArray[Any]) -> NDArray[Any]:
    """Return the upper triangle of a symmetric (n, n) matrix, row by row, as (n (n + 1) / 2,)."""
    return matrix_NN[np.triu_indices(len(matrix_NN))]


def mirror_upper(stack_BNN: NDArray[Any]) -> None:
    """Copy the upper triangles onto the lower ones, in place: exactly symmetric from then on."""
    n = stack_BNN.shape[1]
    for i in range(0, n, _TILE):
        rows = slice(i, i + _TILE)
        diagonal = stack_BNN[:, rows, rows]
        lower = _strictly_lower(diagonal.shape[1])
        np.copyto(diagonal, diagonal.transpose(0, 2, 1).copy(), where=lower)
        for j in range(i + _TILE, n, _TILE):
            columns = slice(j, j + _TILE)
            stack_BNN[:, columns, rows] = stack_BNN[:, rows, columns].transpose(0, 2, 1)


def symmetrise(stack_BNN: Floats) -> None:
    """Replace each matrix by (A + A^T) / 2, in place. Elements must be far from overflow."""
    n = stack_BNN.shape[1]
    for i in range(0, n, _TILE):
        rows = slice(i, i + _TILE)
        for j in range(i, n, _TILE):
            columns = slice(j, j + _TILE)
            mean = stack_BNN[:, rows, columns] + stack_BNN[:, columns, rows].transpose(0, 2, 1)
            mean *= 0.5
            stack_BNN[:, rows, columns] = mean
            stack_BNN[:, columns, rows] = mean.transpose(0, 2, 1)


def largest_asymmetry(stack_BNN: NDArray[Any]) -> Floats:
    """Return the largest |a_ij - a_ji| of each matrix, (b,)."""
    n = stack_BNN.shape[1]
    largest_B = np.zeros(len(stack_BNN))
    with np.errstate(over="ignore"):
        for i in range(0, n, _TILE):
            rows = slice(i, i + _TILE)
            for j in range(i, n, _TILE):
                columns = slice(j, j + _TILE)
                difference = stack_BNN[:, rows, columns] - stack_BNN[:, columns, rows].transpose(0, 2, 1)
                tile_B = np.maximum(difference.max(axis=(1, 2)), -difference.min(axis=(1, 2)))
                np.maximum(largest_B, tile_B, out=largest_B)
    return largest_B


_masks: dict[int, NDArray[np.bool_]] = {}


def _strictly_lower(n: int) -> NDArray[np.bool_]:
    mask = _masks.get(n)
    if mask is None:
        mask = _masks[n] = np.tri(n, k=-1, dtype=np.bool_)
    return mask
