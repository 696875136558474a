"""What travels between the server and its workers: contiguous NumPy arrays and a few numbers.

Apart from :mod:`preconditioner_service.compute`, so that the server does not import what computes roots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from preconditioner_protos.v1 import preconditioner_pb2 as pb

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class RootTask:
    """One block's roots to compute.

    Attributes:
        lengths: side lengths n.
        root_orders: p of every side, for A^(-1/p).
        ridge_kind: a ``RidgeKind``.
        ridge_value: its value.
        dtype: of the result, ``"<f4"`` or ``"<f8"``.
        sides: packed statistics, contiguous and 1-D; never written to.
    """

    lengths: tuple[int, ...]
    root_orders: tuple[float, ...]
    ridge_kind: int
    ridge_value: float
    dtype: str
    sides: tuple[Array, ...]


@dataclass(frozen=True, slots=True)
class RootOutcome:
    """What became of a :class:`RootTask`.

    Attributes:
        sides: packed roots, contiguous and of the task's dtype; ``None`` if any side failed.
        seconds: wall time spent on every side; 0 where a failure came first.
        reason: a ``NackReason`` where ``sides`` is ``None``.
        detail: for people, where ``sides`` is ``None``.
        retries: how many times each side's ridge or threshold was multiplied by ten; empty without ``sides``.
    """

    sides: tuple[Array, ...] | None
    seconds: tuple[float, ...]
    reason: pb.NackReason = pb.NACK_REASON_UNSPECIFIED
    detail: str = ""
    retries: tuple[int, ...] = ()
