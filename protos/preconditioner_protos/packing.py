"""Packing of symmetric matrices as their upper triangle, row by row.

A symmetric ``n x n`` matrix has ``n (n + 1) / 2`` values of its own; only these travel. Packing copies bits
and so is lossless for every dtype; what lies below the diagonal is ignored, and unpacking therefore gives
an exactly symmetric matrix.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.int64]


def packed_length(side: int) -> int:
    """Number of values in the packed form of a ``side x side`` matrix."""
    return side * (side + 1) // 2


_INDEXED_UP_TO = 1024
"""Sides up to this are (un)packed by one gather; the index arrays of larger ones take too much memory."""


@functools.lru_cache(maxsize=64)
def upper_indices(side: int) -> Indices:
    """Flat (row-major) positions of the upper triangle in a ``side x side`` matrix, in packed order.

    Returns:
        Read-only int64 array of shape ``(side (side + 1) / 2,)``.
    """
    rows, columns = np.triu_indices(side)
    indices = (rows * side + columns).astype(np.int64)
    indices.flags.writeable = False
    return indices


@functools.lru_cache(maxsize=64)
def unpacking_indices(side: int) -> Indices:
    """For each flat position of a ``side x side`` matrix, where its value stands in the packed form.

    Returns:
        Read-only int64 array of shape ``(side * side,)``; the gather ``packed[indices]`` is the full matrix.
    """
    position = np.empty((side, side), dtype=np.int64)
    rows, columns = np.triu_indices(side)
    position[rows, columns] = position[columns, rows] = np.arange(packed_length(side), dtype=np.int64)
    indices = position.reshape(-1)
    indices.flags.writeable = False
    return indices


def pack(matrix: Array) -> Array:
    """Upper triangles of symmetric matrices.

    Args:
        matrix: shape ``(..., n, n)``, any dtype.

    Returns:
        A new contiguous array of shape ``(..., n (n + 1) / 2)`` and the same dtype.

    Raises:
        ValueError: the last two dimensions are not equal.
    """
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"pack needs square matrices (..., n, n), not shape {matrix.shape}")
    side = matrix.shape[-1]
    if side <= _INDEXED_UP_TO:
        flat = matrix.reshape(*matrix.shape[:-2], side * side)
        return np.take(flat, upper_indices(side), axis=-1)
    packed = np.empty((*matrix.shape[:-2], packed_length(side)), matrix.dtype)
    start = 0
    for row in range(side):
        packed[..., start : start + side - row] = matrix[..., row, row:]
        start += side - row
    return packed


def unpack(packed: Array, side: int) -> Array:
    """The symmetric matrices whose upper triangles are given; the inverse of :func:`pack`.

    Args:
        packed: shape ``(..., n (n + 1) / 2)``, any dtype.
        side: n.

    Returns:
        A new array of shape ``(..., n, n)`` and the same dtype, exactly symmetric.

    Raises:
        ValueError: the last dimension is not ``n (n + 1) / 2``.
    """
    if packed.shape[-1:] != (packed_length(side),):
        raise ValueError(
            f"a packed {side} x {side} matrix has {packed_length(side)} values, not shape {packed.shape}"
        )
    if side <= _INDEXED_UP_TO:
        full = np.take(packed, unpacking_indices(side), axis=-1)
        return full.reshape(*packed.shape[:-1], side, side)
    matrix = np.empty((*packed.shape[:-1], side, side), packed.dtype)
    start = 0
    for row in range(side):
        values = packed[..., start : start + side - row]
        matrix[..., row, row:] = values
        matrix[..., row + 1 :, row] = values[..., 1:]
        start += side - row
    return matrix
