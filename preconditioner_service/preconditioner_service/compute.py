"""The worker's side: from packed statistics to packed preconditioners, or a reason why there is none.

Runs inside Ray actors. Pure functions of NumPy arrays, so they are tested without Ray.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from preconditioner_protos import packed_length
from preconditioner_protos.v1 import preconditioner_pb2 as pb
from preconditioner_service.roots import (
    AbsoluteRidge,
    Conditioning,
    IndefiniteError,
    NotFiniteError,
    PseudoInverse,
    RelativeRidge,
    Root,
    RootError,
    TraceRidge,
    inverse_roots,
    pack,
)
from preconditioner_service.tasks import RootOutcome, RootTask

_CONDITIONINGS: Mapping[int, Callable[[float], Conditioning]] = {
    pb.RIDGE_KIND_RELATIVE: RelativeRidge,
    pb.RIDGE_KIND_ABSOLUTE: AbsoluteRidge,
    pb.RIDGE_KIND_TRACE: TraceRidge,
    pb.RIDGE_KIND_PSEUDO_INVERSE: PseudoInverse,
}


def compute(tasks: Sequence[RootTask]) -> list[RootOutcome]:
    """Compute every task's roots; equal-sized matrices of a batch go through one call.

    Returns:
        One outcome per task, in order. A bad matrix fails its own task alone.
    """
    groups: defaultdict[tuple[Any, ...], list[tuple[int, int]]] = defaultdict(list)
    for number, task in enumerate(tasks):
        for side, (length, order) in enumerate(zip(task.lengths, task.root_orders, strict=True)):
            packed = task.sides[side]
            key = (length, order, task.ridge_kind, task.ridge_value, task.dtype, packed.dtype.str)
            groups[key].append((number, side))
    roots: dict[tuple[int, int], Root | RootError] = {}
    for (length, order, kind, value, dtype, _), members in groups.items():
        roots.update(_group(tasks, members, length, order, kind, value, dtype))
    return [
        _outcome(task, [roots[number, s] for s in range(len(task.sides))])
        for number, task in enumerate(tasks)
    ]


def _group(
    tasks: Sequence[RootTask],
    members: Sequence[tuple[int, int]],
    length: int,
    order: float,
    kind: int,
    value: float,
    dtype: str,
) -> dict[tuple[int, int], Root | RootError]:
    packed = [tasks[number].sides[side] for number, side in members]
    # One matrix needs no copy; several small ones do, and are cheap to copy.
    stack = packed[0].reshape(1, packed_length(length)) if len(packed) == 1 else np.stack(packed)
    try:
        found = inverse_roots(stack, order, conditioning=_CONDITIONINGS[kind](value), dtype=np.dtype(dtype))
    except RootError as error:  # wrong arguments, as an order beyond the supported range
        found = [error] * len(members)
    return dict(zip(members, found, strict=True))


def _outcome(task: RootTask, roots: Sequence[Root | RootError]) -> RootOutcome:
    seconds = tuple(root.diagnostics.seconds if isinstance(root, Root) else 0.0 for root in roots)
    for side, root in enumerate(roots):
        if isinstance(root, RootError):
            return RootOutcome(None, seconds, nack_reason(root), f"side {side}: {root}")
    found = [root for root in roots if isinstance(root, Root)]
    return RootOutcome(
        tuple(pack(root.matrix) for root in found),
        seconds,
        retries=tuple(root.diagnostics.retries for root in found),
    )


def nack_reason(error: RootError) -> pb.NackReason:
    """The ``NackReason`` by which a trainer learns of an error."""
    if isinstance(error, NotFiniteError):
        return pb.NACK_REASON_NOT_FINITE
    if isinstance(error, IndefiniteError):
        return pb.NACK_REASON_INDEFINITE
    return pb.NACK_REASON_ROOT_FAILED
