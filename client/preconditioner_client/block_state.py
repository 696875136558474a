"""State of one block, as a checkpoint holds it and as it travels between ranks.

The keys are what follows ``block.B.`` in :mod:`preconditioner_client.checkpoint`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from preconditioner_client.config import Adoption, StalenessConfig
from preconditioner_client.engine import Engine
from preconditioner_client.exchange import Snapshot
from preconditioner_client.plan import PlannedRow
from preconditioner_client.schedule import NEVER


def block_state(
    engine: Engine,
    held: PlannedRow,
    taken: Callable[[torch.Tensor], torch.Tensor] = torch.clone,
    under_way: bool = True,
) -> dict[str, Any]:
    """State of a block of this rank.

    Args:
        engine: that keeps it.
        held: the block.
        taken: makes what is given away of statistics and preconditioners.
        under_way: whether snapshots under way are wanted, of which there is no view; else tensors of their
            shapes stand for them, all zero, with memory for one number.
    """
    refresher, stack = engine.refresher, held.entry.stack
    state: dict[str, Any] = {
        "updates": stack.updates[held.row],
        "version": int(refresher.versions[held.block]),
        "first_adopted": int(refresher.first_adopted[held.block]),
        "last_snapshot": refresher.last_snapshot(held.block),
    }
    for side, statistics in enumerate(stack.statistics):
        state[f"statistics.{side}"] = taken(statistics[held.row])
        state[f"preconditioner.{side}"] = taken(stack.preconditioners[side][held.row])
    if stack.averages is not None:
        state["average"] = taken(stack.averages[held.row])
    if refresher.config.adoption is Adoption.SCHEDULED:
        state.update(_in_flight(engine, held) if under_way else _shapes_in_flight(engine, held))
    return state


def blank_block_state(
    sides: Sequence[int], config: StalenessConfig, average: tuple[int, ...] | None = None
) -> dict[str, Any]:
    """The keys of :func:`block_state`, with tensors of the right shapes, on the host.

    Args:
        sides: of the block that are preconditioned.
        config: of the optimizer.
        average: shape of the block, if its preconditioned gradients are averaged.
    """
    state: dict[str, Any] = dict.fromkeys(("updates", "version", "first_adopted", "last_snapshot"), 0)
    for side, n in enumerate(sides):
        state[f"statistics.{side}"] = _host_matrix(n, n)
        state[f"preconditioner.{side}"] = _host_matrix(n, n)
    if average is not None:
        state["average"] = torch.zeros(average, dtype=torch.float32, device="cpu")
    if config.adoption is Adoption.SCHEDULED:
        places = config.snapshots_in_flight
        state["in_flight.steps"] = torch.empty(places, dtype=torch.int64, device="cpu")
        for side, n in enumerate(sides):
            state[f"in_flight.{side}"] = _host_matrix(places, n * (n + 1) // 2)
    return state


def restore_block(
    engine: Engine, held: PlannedRow, state: dict[str, Any], begin: int
) -> tuple[int, int, int]:
    """Put statistics, preconditioners and snapshots under way back.

    Args:
        engine: that keeps the block.
        held: the block.
        state: as :func:`block_state` gave it; empty for a block that starts afresh.
        begin: the step that counts as a fresh block's latest snapshot.

    Returns:
        Version, step of the first adoption and of the latest snapshot.
    """
    stack = held.entry.stack
    stack.updates[held.row] = int(state.get("updates", 0))
    for side, (statistics, preconditioners) in enumerate(
        zip(stack.statistics, stack.preconditioners, strict=True)
    ):
        _copy_or_zero(statistics[held.row], state.get(f"statistics.{side}"))
        _copy_or_zero(preconditioners[held.row], state.get(f"preconditioner.{side}"))
    if stack.averages is not None:
        _copy_or_zero(stack.averages[held.row], state.get("average"))
    if engine.refresher.config.adoption is Adoption.SCHEDULED and "in_flight.steps" in state:
        sides = [state[f"in_flight.{side}"].detach().cpu() for side in range(len(stack.sides))]
        for place, step in enumerate(state["in_flight.steps"].tolist()):
            if step != NEVER:
                packed = tuple(side[place].clone() for side in sides)
                engine.refresher.schedule.add(Snapshot(held.block, step, packed))
    return (
        int(state.get("version", NEVER)),
        int(state.get("first_adopted", NEVER)),
        int(state.get("last_snapshot", begin)),
    )


def _in_flight(engine: Engine, held: PlannedRow) -> dict[str, torch.Tensor]:
    """The snapshots of a block that a schedule waits for."""
    refresher, stack = engine.refresher, held.entry.stack
    places = refresher.config.snapshots_in_flight
    steps = torch.full((places,), NEVER, dtype=torch.int64, device="cpu")
    packed = [_host_matrix(places, n * (n + 1) // 2) for n in stack.sides]
    for place, snapshot in enumerate(refresher.schedule.under_way(held.block)):
        if snapshot.ready is not None:
            snapshot.ready.synchronize()
        steps[place] = snapshot.step
        for kept, side in zip(packed, snapshot.sides, strict=True):
            kept[place] = side
    # On the parameter's device, where torch.distributed.checkpoint wants all tensors of a state.
    state = {"in_flight.steps": steps.to(stack.device)}
    state.update({f"in_flight.{side}": kept.to(stack.device) for side, kept in enumerate(packed)})
    return state


def _host_matrix(rows: int, columns: int) -> torch.Tensor:
    """Zeros in float32 on the host, whatever the program's defaults are."""
    return torch.zeros(rows, columns, dtype=torch.float32, device="cpu")


def _copy_or_zero(target: torch.Tensor, source: torch.Tensor | None) -> None:
    if source is None:
        target.zero_()
    else:
        target.copy_(source)


def _shapes_in_flight(engine: Engine, held: PlannedRow) -> dict[str, torch.Tensor]:
    """The keys and shapes of :func:`_in_flight`."""
    places, stack = engine.refresher.config.snapshots_in_flight, held.entry.stack
    state = {"in_flight.steps": torch.full((places,), NEVER, dtype=torch.int64, device=stack.device)}
    zero = torch.zeros((), dtype=torch.float32, device=stack.device)
    for side, n in enumerate(stack.sides):
        state[f"in_flight.{side}"] = zero.expand(places, n * (n + 1) // 2)
    return state
