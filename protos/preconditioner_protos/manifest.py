"""What the chunk layer needs to know of a manifest: how many bytes each packed matrix has.

Both ends derive every size from the manifest that opened the session; no message can claim one.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from preconditioner_protos.packing import packed_length
from preconditioner_protos.v1 import preconditioner_pb2 as pb

PROTOCOL_VERSION = 1
"""The version of ``v1/preconditioner.proto`` that this package speaks."""

MAX_MESSAGE_BYTES = 4 * 1024 * 1024
"""gRPC's default limit for one message, and ours."""

MAX_ENTRIES = 16384
"""Chunks, receipts or NACKs in one message."""

MAX_SIDES = 16
"""Of one block."""

JOB_PATTERN = re.compile(r"[A-Za-z0-9._-]{1,200}")
MAX_NAME_BYTES = 512

_DTYPES: dict[int, np.dtype[Any]] = {
    pb.DTYPE_FLOAT32: np.dtype("<f4"),
    pb.DTYPE_FLOAT64: np.dtype("<f8"),
}


class ManifestError(ValueError):
    """A manifest or session request that contradicts the protocol; the message names field and value."""


def numpy_dtype(dtype: int) -> np.dtype[Any]:
    """Little-endian NumPy dtype of a protocol ``DType``.

    Raises:
        ManifestError: unknown or unspecified.
    """
    try:
        return _DTYPES[dtype]
    except KeyError:
        raise ManifestError(f"dtype {dtype} is none of FLOAT32 (1), FLOAT64 (2)") from None


_RIDGE_KINDS = frozenset(pb.RidgeKind.values()) - {pb.RIDGE_KIND_UNSPECIFIED}


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes of every matrix of a manifest, in one dtype.

    Attributes:
        sides: for each block its side lengths n.
        dtype: little-endian dtype of the packed values.
    """

    sides: tuple[tuple[int, ...], ...]
    dtype: np.dtype[Any]

    @classmethod
    def of_statistics(cls, manifest: pb.Manifest) -> Layout:
        """Layout of the snapshots of a manifest."""
        return cls(_sides(manifest), numpy_dtype(manifest.statistics_dtype))

    @classmethod
    def of_preconditioners(cls, manifest: pb.Manifest) -> Layout:
        """Layout of the preconditioners of a manifest."""
        return cls(_sides(manifest), numpy_dtype(manifest.preconditioner_dtype))

    def __len__(self) -> int:
        return len(self.sides)

    def matrix_bytes(self, block: int, side: int) -> int:
        """Bytes of one packed matrix."""
        return packed_length(self.sides[block][side]) * self.dtype.itemsize

    def block_bytes(self, block: int) -> int:
        """Bytes of the packed matrices of all sides of a block."""
        return sum(packed_length(n) for n in self.sides[block]) * self.dtype.itemsize

    def total_bytes(self) -> int:
        """Bytes of one snapshot of every block."""
        return sum(self.block_bytes(block) for block in range(len(self.sides)))


def _sides(manifest: pb.Manifest) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(side.length for side in block.sides) for block in manifest.blocks)


def check_manifest(manifest: pb.Manifest) -> None:
    """Hold a manifest against the protocol, allocating nothing.

    Raises:
        ManifestError: naming the field and the value.
    """
    numpy_dtype(manifest.statistics_dtype)
    numpy_dtype(manifest.preconditioner_dtype)
    for index, block in enumerate(manifest.blocks):
        field = f"manifest.blocks[{index}]"
        if len(block.name.encode()) > MAX_NAME_BYTES:
            raise ManifestError(f"{field}.name is longer than {MAX_NAME_BYTES} bytes")
        if block.ridge.kind not in _RIDGE_KINDS:
            raise ManifestError(f"{field}.ridge.kind {block.ridge.kind} is not a known RidgeKind")
        if not (math.isfinite(block.ridge.value) and block.ridge.value >= 0):
            raise ManifestError(f"{field}.ridge.value must be finite and >= 0, not {block.ridge.value}")
        if not block.sides:
            raise ManifestError(f"{field} ({block.name!r}) has no side")
        if len(block.sides) > MAX_SIDES:
            raise ManifestError(
                f"{field} ({block.name!r}) has {len(block.sides)} sides, at most are {MAX_SIDES}"
            )
        for number, side in enumerate(block.sides):
            if side.length < 1:
                raise ManifestError(f"{field}.sides[{number}].length must be >= 1")
            if not (math.isfinite(side.root_order) and side.root_order > 0):
                raise ManifestError(
                    f"{field}.sides[{number}].root_order must be finite and > 0, not {side.root_order}"
                )


def check_job(job: str) -> None:
    """Hold a job's name against the protocol.

    Raises:
        ManifestError: naming the value.
    """
    if not JOB_PATTERN.fullmatch(job):
        raise ManifestError(f"job {job[:80]!r} is not 1 to 200 characters of [A-Za-z0-9._-]")


def check_open_request(request: pb.OpenSessionRequest) -> None:
    """Hold all of an ``OpenSessionRequest`` but its protocol version against the protocol.

    Raises:
        ManifestError: naming the field and the value.
    """
    check_job(request.job)
    if request.world_size < 1 or request.rank >= request.world_size:
        raise ManifestError(
            f"rank {request.rank} and world_size {request.world_size}: needed is 0 <= rank < world_size"
        )
    check_manifest(request.manifest)
