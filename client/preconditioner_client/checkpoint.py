"""State of the optimizer as a state dict: stable keys, complete, free of anything but tensors and numbers.

Per parameter:

==============================  ================================================================
key                             value
==============================  ================================================================
``step``                        int, updates of this parameter
``exp_avg``                     EMA of the gradient, if ``beta1 > 0``
``second_moment``               of the grafting method, if it keeps one
``momentum_buffer``             if ``momentum > 0``, after the first step
``block.B.updates``             int, accumulations into the statistics of block B
``block.B.version``             int, step of the preconditioner in use, -1 without
``block.B.first_adopted``       int, step since which there is a version, -1 without
``block.B.last_snapshot``       int, step of the newest snapshot
``block.B.statistics.I``        (n, n) of the I-th preconditioned side
``block.B.preconditioner.I``    (n, n), if there is a version
``block.B.in_flight.S.I``       packed snapshot of step S that a schedule still waits for
==============================  ================================================================

Per group: the scalar settings, and ``preconditioner_format``, ``preconditioner_step``,
``preconditioner_epoch``. The settings objects (``grafting``, ``statistics``, ``blocking``, ``root``) are the
program's and are not saved.
"""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from preconditioner_client.engine import Engine
from preconditioner_client.exchange import Snapshot
from preconditioner_client.plan import GroupPlan, StackPlan
from preconditioner_client.refresh import NEVER, Refresher

if TYPE_CHECKING:
    from preconditioner_client.shampoo import Shampoo

FORMAT = 1
"""Version of the keys above; a checkpoint of another format is refused."""

FORMAT_KEY = "preconditioner_format"
STEP_KEY = "preconditioner_step"
EPOCH_KEY = "preconditioner_epoch"

_ELEMENTWISE = ("exp_avg", "second_moment", "momentum_buffer")
_SETTINGS = ("grafting", "statistics", "blocking", "root")
_IN_FLIGHT = re.compile(r"block\.(\d+)\.in_flight\.(\d+)\.(\d+)")


def write(optimizer: Shampoo, engine: Engine) -> None:
    """Put everything that lives outside of ``optimizer.state`` into it, for the base class to collect."""
    for group, plan in zip(optimizer.param_groups, engine.plans, strict=True):
        group[FORMAT_KEY], group[STEP_KEY], group[EPOCH_KEY] = FORMAT, engine.step, engine.epoch
        for index, parameter in enumerate(group["params"]):
            if plan.rows[index]:
                state = optimizer.state[parameter]
                for key in [key for key in state if key.startswith("block.")]:
                    del state[key]
                state.update(block_states(engine, plan, index))


def block_states(engine: Engine, plan: GroupPlan, index: int) -> dict[str, Any]:
    """The ``block.*`` keys of one parameter."""
    states: dict[str, Any] = {}
    for number, (entry, row) in enumerate(plan.rows[index]):
        block = entry.first + row
        under_way = [s for (b, _), s in sorted(engine.refresher.scheduled.items()) if b == block]
        states.update(_block_state(f"block.{number}", entry, row, engine.refresher, under_way))
    return states


def _block_state(
    prefix: str, entry: StackPlan, row: int, refresher: Refresher, snapshots: list[Snapshot]
) -> dict[str, Any]:
    block = entry.first + row
    version = int(refresher.versions[block])
    state: dict[str, Any] = {
        f"{prefix}.updates": entry.stack.updates[row],
        f"{prefix}.version": version,
        f"{prefix}.first_adopted": int(refresher.first_adopted[block]),
        f"{prefix}.last_snapshot": refresher.last_snapshot(block),
    }
    for side, statistics in enumerate(entry.stack.statistics):
        # Copies: a view would drag the whole stack into the file, and change with the next step.
        state[f"{prefix}.statistics.{side}"] = statistics[row].clone()
        if version != NEVER:
            state[f"{prefix}.preconditioner.{side}"] = entry.stack.preconditioners[side][row].clone()
    for snapshot in snapshots:
        for side, packed in enumerate(snapshot.sides):
            state[f"{prefix}.in_flight.{snapshot.step}.{side}"] = packed
    return state


def strip_settings(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Without the settings objects, which only pickle could carry."""
    groups = [{k: v for k, v in group.items() if k not in _SETTINGS} for group in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups}


def with_settings(optimizer: Shampoo, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The settings objects of the running program put back."""
    groups = [
        {**saved, **{key: group[key] for key in _SETTINGS}}
        for saved, group in zip(state_dict["param_groups"], optimizer.param_groups, strict=True)
    ]
    return {**state_dict, "param_groups": groups}


def check(optimizer: Shampoo, engine: Engine, state_dict: dict[str, Any]) -> None:
    """Hold a checkpoint against the running optimizer before anything is changed.

    Raises:
        ValueError: another format, other groups, or tensors of another shape; names the parameter.
    """
    groups = state_dict["param_groups"]
    sizes = [len(group["params"]) for group in groups]
    own = [len(group["params"]) for group in optimizer.param_groups]
    if sizes != own:
        raise ValueError(f"the checkpoint has groups of {sizes} parameters, the optimizer of {own}")
    for saved, group, plan in zip(groups, optimizer.param_groups, engine.plans, strict=True):
        check_format(saved)
        for index, (identity, parameter) in enumerate(zip(saved["params"], group["params"], strict=True)):
            elementwise = dict.fromkeys(_ELEMENTWISE, tuple(parameter.shape))
            check_state(state_dict["state"].get(identity, {}), elementwise, plan, index)


def check_format(saved: dict[str, Any]) -> None:
    """Refuse what another optimizer, or another version of this one, wrote.

    Raises:
        ValueError: naming the format found.
    """
    found = saved.get(FORMAT_KEY)
    if found != FORMAT:
        raise ValueError(
            f"the checkpoint has {FORMAT_KEY} {found}, this version reads {FORMAT}: it was written by "
            f"another optimizer, or by another version of this one"
        )


def check_state(
    state: dict[str, Any], elementwise: dict[str, tuple[int, ...]], plan: GroupPlan, index: int
) -> None:
    """Hold one parameter's state against the plan.

    Args:
        state: as saved.
        elementwise: keys and shapes that may stand there beside the blocks'.
        plan: of the group.
        index: of the parameter in the group.

    Raises:
        ValueError: an unknown key, or a tensor of another shape; names the parameter.
    """
    name = plan.names[index]
    expected = dict(elementwise)
    for number, (entry, _) in enumerate(plan.rows[index]):
        for side, n in enumerate(entry.stack.sides):
            expected[f"block.{number}.statistics.{side}"] = (n, n)
            expected[f"block.{number}.preconditioner.{side}"] = (n, n)
    for key, value in state.items():
        plain = key == "step" or key.endswith((".updates", ".version", ".first_adopted", ".last_snapshot"))
        if plain or _IN_FLIGHT.fullmatch(key):
            continue
        if key not in expected:
            raise ValueError(
                f"{name}: the checkpoint has the unknown key {key!r}; were blocking or model changed since?"
            )
        if tuple(value.shape) != expected[key]:
            raise ValueError(
                f"{name}: {key} has shape {tuple(value.shape)} in the checkpoint, {expected[key]} is needed"
            )


def read(optimizer: Shampoo, engine: Engine, state_dict: dict[str, Any]) -> None:
    """Take the state out of a checkpoint that passed :func:`check`, after the base class loaded it."""
    stored = []
    for saved, group in zip(state_dict["param_groups"], optimizer.param_groups, strict=True):
        states = [state_dict["state"].get(identity, {}) for identity in saved["params"]]
        stored.append(states)
        for parameter, state in zip(group["params"], states, strict=True):
            # The base class would cast to the parameter's dtype; state keeps its own.
            own = {k: _copied(v, parameter.device) for k, v in state.items() if not k.startswith("block.")}
            optimizer.state.pop(parameter, None)
            if own:
                optimizer.state[parameter] = own
    first = state_dict["param_groups"][0]
    restore_blocks(engine, stored, int(first[STEP_KEY]), int(first[EPOCH_KEY]))


def restore_blocks(engine: Engine, stored: list[list[dict[str, Any]]], step: int, epoch: int) -> None:
    """Put the ``block.*`` keys of every parameter back, and continue at their step in a new epoch.

    Args:
        engine: with the plans that the states were checked against.
        stored: per group, per parameter its state.
        step: of the checkpoint.
        epoch: of the checkpoint.
    """
    refresher = engine.refresher
    versions, first, last = (np.full(refresher.versions.size, NEVER, dtype=np.int64) for _ in range(3))
    refresher.scheduled.clear()
    for plan, states in zip(engine.plans, stored, strict=True):
        for rows, state in zip(plan.rows, states, strict=True):
            for number, (entry, row) in enumerate(rows):
                block = entry.first + row
                prefix = f"block.{number}"
                versions[block] = int(state.get(f"{prefix}.version", NEVER))
                first[block] = int(state.get(f"{prefix}.first_adopted", NEVER))
                last[block] = int(state.get(f"{prefix}.last_snapshot", refresher.last_snapshot(block)))
                entry.stack.updates[row] = int(state.get(f"{prefix}.updates", 0))
                for side, (statistics, preconditioners) in enumerate(
                    zip(entry.stack.statistics, entry.stack.preconditioners, strict=True)
                ):
                    _copy_or_zero(statistics[row], state.get(f"{prefix}.statistics.{side}"))
                    _copy_or_zero(preconditioners[row], state.get(f"{prefix}.preconditioner.{side}"))
            _read_in_flight(state, rows, refresher)
    refresher.restore(versions.tolist(), first.tolist(), last.tolist())
    engine.resume(step, epoch)


def _copied(value: Any, device: torch.device) -> Any:
    return value.detach().clone().to(device) if torch.is_tensor(value) else copy.copy(value)


def _copy_or_zero(target: torch.Tensor, source: torch.Tensor | None) -> None:
    if source is None:
        target.zero_()
    else:
        target.copy_(source)


def _read_in_flight(stored: dict[str, Any], rows: list[tuple[StackPlan, int]], refresher: Refresher) -> None:
    found: dict[tuple[int, int], dict[int, torch.Tensor]] = {}
    for key, value in stored.items():
        match = _IN_FLIGHT.fullmatch(key)
        if match:
            number, step, side = (int(part) for part in match.groups())
            entry, row = rows[number]
            found.setdefault((entry.first + row, step), {})[side] = value.detach().cpu().clone()
    for (block, step), sides in found.items():
        refresher.scheduled[(block, step)] = Snapshot(
            block, step, tuple(sides[side] for side in sorted(sides))
        )
