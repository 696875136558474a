"""Rule 8: every adopted preconditioner is the root of the snapshot that its version names.

Computed again in float64 by the client's own eigendecomposition, which shares no code with the service's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
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

_EPS = float(np.finfo(np.float64).eps)


@dataclass(frozen=True, slots=True)
class _Problem:
    """An adopted preconditioner, and what it must be the root of.

    Attributes:
        snapshot: whose version it has.
        adopted: the event.
        block: as the session announced it.
        retries: by side, how often the service may have multiplied the ridge by ten: as often as it said that
            it did, or where nobody wrote that down, as often as it may.
    """

    snapshot: Event
    adopted: Event
    block: Any
    retries: Sequence[Sequence[int]]


def check_roots(case: Case) -> Findings:
    """The adopted preconditioners, or ``Expectations.roots`` of them, spread evenly."""
    findings = Findings(8, "roots")
    folder = case.expectations.matrices
    if folder is None:
        return findings
    problems = _problems(case)
    most = case.expectations.roots
    count = len(problems) if most is None else min(len(problems), most)
    chosen = np.linspace(0, len(problems) - 1, count, dtype=int)
    for number in dict.fromkeys(chosen.tolist()):
        problem = problems[number]
        adopted, block = problem.adopted, problem.block
        for side in range(len(block["sides"])):
            worst = _difference(folder, problem, side)
            if worst is None:
                continue
            findings.looked_at += 1
            if not worst <= TOLERANCE:
                findings.broken(
                    f"side {side} of block {adopted.block} ({block['name']}) is not the root of its "
                    f"snapshot: entries differ by {worst:.1e} of the largest, with the ridge times ten to "
                    f"the power {' or '.join(map(str, problem.retries[side]))}",
                    problem.snapshot,
                    adopted,
                )
    return findings


def _problems(case: Case) -> list[_Problem]:
    snapshots: dict[Key, Event] = {}
    for event in case.of(Kind.SNAPSHOT_SENT, Kind.SNAPSHOT_ACCEPTED):
        if event.data["digests"]:
            snapshots.setdefault(key_of(event), event)
    # Of one key there are several after a restart of the service, which computes it again.
    published: dict[Key, list[Event]] = defaultdict(list)
    for event in case.of(Kind.PUBLISHED):
        published[key_of(event)].append(event)
    problems = []
    for life in case.lives:
        blocks = life.setting("blocks")
        for event in life.of(Kind.ADOPTED):
            key = key_of(event)
            # A block that the session does not have is for another rule.
            if not event.data["digests"] or key not in snapshots or key[1] >= len(blocks):
                continue
            block = blocks[key[1]]
            problems.append(_Problem(snapshots[key], event, block, _retries(event, published[key], block)))
    return problems


def _retries(adopted: Event, published: Sequence[Event], block: Any) -> Sequence[Sequence[int]]:
    """See :class:`_Problem`."""
    made = [event for event in published if event.data["digests"] == adopted.data["digests"]]
    if not made or not all("retries" in event.data for event in made):
        return [range(RETRIES + 1)] * len(block["sides"])
    sides = zip(*(event.data["retries"] for event in made), strict=True)
    return [sorted({retry for retry in of_side if 0 <= retry <= RETRIES}) for of_side in sides]


def _difference(folder: Path, problem: _Problem, side: int) -> float | None:
    """Of the adopted root and that of its snapshot; None where one of them was not saved."""
    packed = load_matrix(folder, problem.snapshot.data["digests"][side])
    root = load_matrix(folder, problem.adopted.data["digests"][side])
    if packed is None or root is None:
        return None
    n, order = problem.block["sides"][side], problem.block["root_orders"][side]
    statistics, found = unpack(packed, n), float("inf")
    for retry in problem.retries[side]:
        ridge = _escalated(problem.block["ridge"], statistics, retry)
        found = min(found, _misfit(statistics, unpack(root, n), order, ridge))
        if found <= TOLERANCE:
            break
    return found


def _escalated(announced: Any, statistics: npt.NDArray[np.float32], retry: int) -> Ridge:
    """The ridge or threshold of a retry: ten times more each time, of no less than rounding."""
    kind, value = RidgeKind(announced[0]), float(announced[1])
    if retry == 0:
        return Ridge(kind=kind, value=value)
    least = len(statistics) * _EPS
    if kind in (RidgeKind.ABSOLUTE, RidgeKind.TRACE):
        largest = float(np.linalg.eigvalsh(statistics.astype(np.float64))[-1])
        mean = float(np.trace(statistics, dtype=np.float64)) / len(statistics) or 1.0
        least *= largest if kind is RidgeKind.ABSOLUTE else largest / mean
    return Ridge(kind=kind, value=max(value, least) * 10.0**retry)


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
