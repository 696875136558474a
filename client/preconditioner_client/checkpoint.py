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

import torch

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

_SETTINGS = ("grafting", "statistics", "blocking", "root")
_IN_FLIGHT = re.compile(r"block\.(\d+)\.in_flight\.(\d+)\.(\d+)")


def write(optimizer: Shampoo, plans: list[GroupPlan], refresher: Refresher, step: int, epoch: int) -> None:
    """Put everything that lives outside of ``optimizer.state`` into it, for the base class to collect."""
    under_way: dict[int, list[Snapshot]] = {}
    for (block, _), snapshot in sorted(refresher.scheduled.items()):
        under_way.setdefault(block, []).append(snapshot)
    for group, plan in zip(optimizer.param_groups, plans, strict=True):
        group[FORMAT_KEY], group[STEP_KEY], group[EPOCH_KEY] = FORMAT, step, epoch
        for parameter, rows in zip(group["params"], plan.rows, strict=True):
            if rows:
                state = optimizer.state[parameter]
                for key in [key for key in state if key.startswith("block.")]:
                    del state[key]
                for number, (entry, row) in enumerate(rows):
                    snapshots = under_way.get(entry.first + row, [])
                    state.update(_block_state(f"block.{number}", entry, row, refresher, snapshots))


def _block_state(
    prefix: str, entry: StackPlan, row: int, refresher: Refresher, snapshots: list[Snapshot]
) -> dict[str, Any]:
    block = entry.first + row
    version = int(refresher.versions[block])
    state: dict[str, Any] = {
        f"{prefix}.updates": entry.stack.updates[row],
        f"{prefix}.version": version,
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


def check(optimizer: Shampoo, plans: list[GroupPlan], state_dict: dict[str, Any]) -> None:
    """Hold a checkpoint against the running optimizer before anything is changed.

    Raises:
        ValueError: another format, other groups, or tensors of another shape; names the parameter.
    """
    groups = state_dict["param_groups"]
    sizes = [len(group["params"]) for group in groups]
    own = [len(group["params"]) for group in optimizer.param_groups]
    if sizes != own:
        raise ValueError(f"the checkpoint has groups of {sizes} parameters, the optimizer of {own}")
    for saved, group, plan in zip(groups, optimizer.param_groups, plans, strict=True):
        found = saved.get(FORMAT_KEY)
        if found != FORMAT:
            raise ValueError(
                f"the checkpoint has {FORMAT_KEY} {found}, this version reads {FORMAT}: it was written by "
                f"another optimizer, or by another version of this one"
            )
        for index, (identity, parameter) in enumerate(zip(saved["params"], group["params"], strict=True)):
            state = state_dict["state"].get(identity, {})
            _check_parameter(state, parameter, plan, index)


def _check_parameter(state: dict[str, Any], parameter: torch.Tensor, plan: GroupPlan, index: int) -> None:
    name = plan.names[index]
    expected: dict[str, tuple[int, ...]] = dict.fromkeys(
        ("exp_avg", "second_moment", "momentum_buffer"), tuple(parameter.shape)
    )
    for number, (entry, _) in enumerate(plan.rows[index]):
        for side, n in enumerate(entry.stack.sides):
            expected[f"block.{number}.statistics.{side}"] = (n, n)
            expected[f"block.{number}.preconditioner.{side}"] = (n, n)
    for key, value in state.items():
        plain = key == "step" or key.endswith((".updates", ".version", ".last_snapshot"))
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


def read(
    optimizer: Shampoo, plans: list[GroupPlan], refresher: Refresher, state_dict: dict[str, Any]
) -> tuple[int, int]:
    """Take the state out of a checkpoint that passed :func:`check`, after the base class loaded it.

    Returns:
        Step and epoch of the checkpoint.
    """
    versions, last_snapshots = refresher.versions.copy(), refresher.versions.copy()
    refresher.scheduled.clear()
    for saved, group, plan in zip(state_dict["param_groups"], optimizer.param_groups, plans, strict=True):
        for index, (identity, parameter) in enumerate(zip(saved["params"], group["params"], strict=True)):
            stored = state_dict["state"].get(identity, {})
            state = optimizer.state[parameter]
            state.clear()
            for key, value in stored.items():
                if not key.startswith("block."):
                    # The base class would cast to the parameter's dtype; state keeps its own.
                    state[key] = (
                        value.detach().clone().to(parameter.device)
                        if torch.is_tensor(value)
                        else copy.copy(value)
                    )
            if not state:
                del optimizer.state[parameter]
            for number, (entry, row) in enumerate(plan.rows[index]):
                block = entry.first + row
                prefix = f"block.{number}"
                versions[block] = int(stored.get(f"{prefix}.version", NEVER))
                last_snapshots[block] = int(
                    stored.get(f"{prefix}.last_snapshot", refresher.last_snapshot(block))
                )
                entry.stack.updates[row] = int(stored.get(f"{prefix}.updates", 0))
                for side in range(len(entry.stack.sides)):
                    _copy_or_zero(
                        entry.stack.statistics[side][row], stored.get(f"{prefix}.statistics.{side}")
                    )
                    _copy_or_zero(
                        entry.stack.preconditioners[side][row], stored.get(f"{prefix}.preconditioner.{side}")
                    )
            _read_in_flight(stored, plan.rows[index], refresher)
    refresher.restore(versions.tolist(), last_snapshots.tolist())
    first = state_dict["param_groups"][0]
    return int(first[STEP_KEY]), int(first[EPOCH_KEY])


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
