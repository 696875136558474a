"""Rule 8: every adopted preconditioner is the root of the snapshot that its version names.

Computed again in float64 by the client's own eigendecomposition, which shares no code with the service's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from preconditioner_client import Ridge
from preconditioner_client.config import RidgeKind
from preconditioner_client.roots import inverse_root
from preconditioner_protos import unpack
from preconditioner_protos.history import Event, Kind, load_matrix
from preconditioner_worker.history.case import Case, Key, key_of
from preconditioner_worker.history.findings import Findings

TOLERANCE = 1e-5
"""Largest difference of two entries, as a fraction of the largest entry: float32 has 24 bits."""

RETRIES = 3
"""How often the service may have multiplied the ridge by ten to meet its bound."""

_PROBLEM = tuple[Event, Event, Any]


def check_roots(case: Case) -> Findings:
    """Of the adopted preconditioners, ``Expectations.roots`` of them, spread evenly."""
    findings = Findings(8, "roots")
    folder = case.expectations.matrices
    if folder is None:
        return findings
    problems = _problems(case)
    chosen = np.linspace(0, len(problems) - 1, min(len(problems), case.expectations.roots), dtype=int)
    for number in dict.fromkeys(chosen.tolist()):
        snapshot, adopted, block = problems[number]
        for side, n in enumerate(block["sides"]):
            worst = _difference(folder, snapshot, adopted, side, n, block)
            if worst is None:
                continue
            findings.looked_at += 1
            if not worst <= TOLERANCE:
                findings.broken(
                    f"side {side} of block {adopted.block} ({block['name']}) is not the root of its "
                    f"snapshot: entries differ by {worst:.1e} of the largest",
                    snapshot,
                    adopted,
                )
    return findings


def _problems(case: Case) -> list[_PROBLEM]:
    snapshots: dict[Key, Event] = {}
    for event in case.of(Kind.SNAPSHOT_SENT, Kind.SNAPSHOT_ACCEPTED):
        if event.data["digests"]:
            snapshots.setdefault(key_of(event), event)
    return [
        (snapshots[key_of(event)], event, life.setting("blocks")[event.block])
        for life in case.lives
        for event in life.of(Kind.ADOPTED)
        if event.data["digests"] and key_of(event) in snapshots
    ]


def _difference(folder: Path, snapshot: Event, adopted: Event, side: int, n: int, block: Any) -> float | None:
    """Of the adopted root and that of its snapshot; None where one of them was not saved."""
    packed = load_matrix(folder, snapshot.data["digests"][side])
    root = load_matrix(folder, adopted.data["digests"][side])
    if packed is None or root is None:
        return None
    kind, value = block["ridge"]
    found = float("inf")
    for retry in range(RETRIES + 1):
        ridge = Ridge(kind=RidgeKind(kind), value=value * 10.0**retry)
        found = min(found, _misfit(unpack(packed, n), unpack(root, n), block["root_orders"][side], ridge))
        if found <= TOLERANCE:
            break
    return found


def _misfit(
    statistics: npt.NDArray[np.float32], root: npt.NDArray[np.float32], order: float, ridge: Ridge
) -> float:
    if not statistics.any() and ridge.kind is not RidgeKind.ABSOLUTE:
        # Nothing tells directions apart: any multiple of the identity is right.
        expected = np.eye(len(root)) * float(root[0, 0])
    else:
        try:
            expected = inverse_root(torch.from_numpy(statistics), order, ridge).numpy().astype(np.float64)
        except ValueError:  # there is no root of it
            return float("inf")
    return float(np.abs(root - expected).max() / np.abs(expected).max())
