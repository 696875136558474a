"""Symmetric storage: packed upper triangles, mirroring, and how far a matrix is from its transpose.

A transposed pass over a large matrix misses the cache at every element, so all of these go by strips of
rows whose transposes stay in cache. Packed order is that of the wire: the upper triangle row by row,
a00 a01 .. a0n a11 .. ann.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .conditioning import Floats

FULL_UP_TO = 128
"""Rows up to which matrices in work have both triangles; beyond, reading only the upper one pays."""
_STRIP = 64
_MIRROR_STRIP = 32


def unpack(packed_BP: NDArray[Any], out_BNN: NDArray[Any]) -> None:
    """Write packed upper triangles into the upper triangles of out_BNN; the rest is left as it is."""
    n = out_BNN.shape[1]
    start = 0
    for row in range(n):
        out_BNN[:, row, row:] = packed_BP[:, start : start + n - row]
        start += n - row


def pack(matrix_NN: NDArray[Any]) -> NDArray[Any]:
    """Return the upper triangle of a symmetric (n, n) matrix, row by row, as (n (n + 1) / 2,)."""
    n = len(matrix_NN)
    packed_P = np.empty(n * (n + 1) // 2, matrix_NN.dtype)
    start = 0
    for row in range(n):
        packed_P[start : start + n - row] = matrix_NN[row, row:]
        start += n - row
    return packed_P


def mirror_upper(stack_BNN: NDArray[Any]) -> None:
    """Copy the upper triangles onto the lower ones, in place: exactly symmetric from then on."""
    n = stack_BNN.shape[1]
    for start in range(0, n, _MIRROR_STRIP):
        end = start + _MIRROR_STRIP
        square_BSS = stack_BNN[:, start:end, start:end]
        lower_SS = _strictly_lower(square_BSS.shape[1])
        np.copyto(square_BSS, square_BSS.transpose(0, 2, 1).copy(), where=lower_SS)
        stack_BNN[:, end:, start:end] = stack_BNN[:, start:end, end:].transpose(0, 2, 1)


def symmetrise(stack_BNN: Floats) -> None:
    """Replace each matrix by (A + A^T) / 2, in place. Elements must be far from overflow."""
    n = stack_BNN.shape[1]
    for start in range(0, n, _STRIP):
        end = start + _STRIP
        mean_BSM = stack_BNN[:, start:end, start:] + stack_BNN[:, start:, start:end].transpose(0, 2, 1)
        mean_BSM *= 0.5
        stack_BNN[:, start:end, start:] = mean_BSM
        stack_BNN[:, start:, start:end] = mean_BSM.transpose(0, 2, 1)


def largest_asymmetry(stack_BNN: NDArray[Any]) -> Floats:
    """Return the largest |a_ij - a_ji| of each matrix, (b,)."""
    count, n = stack_BNN.shape[:2]
    largest_B: Floats = np.zeros(count)
    if count == 0:
        return largest_B
    for start in range(0, n, _STRIP):
        end = start + _STRIP
        strip_BMS = stack_BNN[:, start:, start:end]
        difference_BMS = strip_BMS - stack_BNN[:, start:end, start:].transpose(0, 2, 1)
        np.abs(difference_BMS, out=difference_BMS)
        np.maximum(largest_B, difference_BMS.reshape(count, -1).max(axis=1), out=largest_B)
    return largest_B


@lru_cache(maxsize=_MIRROR_STRIP)
def _strictly_lower(n: int) -> NDArray[np.bool_]:
    return np.tri(n, k=-1, dtype=np.bool_)
