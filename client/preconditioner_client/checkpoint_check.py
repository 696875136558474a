"""Whether a checkpoint fits the running optimizer, found out before anything is changed."""

from __future__ import annotations

import numbers
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from preconditioner_client.checkpoint import (
    BLOCK,
    ELEMENTWISE,
    EPOCH_KEY,
    FORMAT,
    FORMAT_KEY,
    SHARDS_KEY,
    STEP_KEY,
)
from preconditioner_client.distribution import is_dtensor, local
from preconditioner_client.engine import Engine
from preconditioner_client.groups import check_saved_group
from preconditioner_client.plan import GroupPlan, PlannedRow
from preconditioner_client.update_rule import lasting_keys

if TYPE_CHECKING:
    from preconditioner_client.preconditioned_optimizer import PreconditionedOptimizer

_NUMBERS = ("updates", "version", "first_adopted", "last_snapshot")


def check(optimizer: PreconditionedOptimizer, engine: Engine, state_dict: dict[str, Any]) -> None:
    """Hold a checkpoint against the running optimizer before anything is changed.

    Raises:
        ValueError: another format, other groups, values of another type or shape, a lacking key, or not all
            blocks of this rank; names the parameter or the setting.
    """
    check_keys(state_dict, "state", "param_groups")
    groups = state_dict["param_groups"]
    if len(groups) != len(optimizer.param_groups):
        raise ValueError(
            f"the checkpoint has {len(groups)} groups of parameters, the optimizer {len(engine.plans)}: make "
            f"the same groups as when it was saved, those added by add_param_group too, before it is loaded"
        )
    for saved, plan in zip(groups, engine.plans, strict=True):
        check_keys(saved, "params")
        check_format(saved)
        _check_size(saved, plan)
    for number, (saved, group) in enumerate(zip(groups, optimizer.param_groups, strict=True)):
        check_saved_group(saved, group, number)
    for saved, group, plan in zip(groups, optimizer.param_groups, engine.plans, strict=True):
        for index, (identity, parameter) in enumerate(zip(saved["params"], group["params"], strict=True)):
            state = state_dict["state"].get(identity, {})
            elementwise = dict.fromkeys(ELEMENTWISE, tuple(parameter.shape))
            elementwise.update(optimizer.own_state_shapes(parameter))
            own_keys = list(optimizer.own_state_shapes(parameter))
            required = [*lasting_keys({**group, "beta1": saved.get("beta1", group["beta1"])}), *own_keys]
            way_out = (
                f"load it with the grafting and beta1 that it was saved with ({saved.get('grafting')}), or "
                f"take state_dict['state'][{identity!r}] out of it, so that this parameter begins anew"
            )
            check_state(state, elementwise, required, way_out, plan, index, saved.get(SHARDS_KEY))
            for key in ELEMENTWISE:
                _check_placement(plan.names[index], key, parameter, state.get(key))


def check_keys(state_dict: dict[str, Any], *keys: str) -> None:
    """Refuse what is no state dict.

    Raises:
        ValueError: it lacks one of the keys; names it.
    """
    for key in keys:
        if key not in state_dict:
            raise ValueError(f"the checkpoint lacks {key!r}: it is no complete state_dict()")


def _check_size(saved: dict[str, Any], plan: GroupPlan) -> None:
    """As many parameters in a group; where there are not, the first that differs is named."""
    sizes = len(saved["params"]), len(plan.names)
    if sizes[0] == sizes[1]:
        return
    names = [str(name) for name in saved.get("param_names", ())]
    differing = (i for i, (a, b) in enumerate(zip(names, plan.names, strict=False)) if a != b)
    first = next(differing, min(sizes))
    known = plan.names if first < len(plan.names) else names
    name = known[first] if first < len(known) else f"parameter {first}"
    raise ValueError(
        f"the checkpoint has a group of {sizes[0]} parameters where the optimizer has {sizes[1]}; they "
        f"differ from {name} on: make groups of the same parameters in the same order as when it was saved"
    )


def check_format(saved: dict[str, Any]) -> None:
    """Refuse what another optimizer, or another version of this one, wrote, and what has no step or epoch.

    Raises:
        ValueError: naming the format found, or the key.
    """
    found = saved.get(FORMAT_KEY)
    if found != FORMAT:
        raise ValueError(
            f"the checkpoint has {FORMAT_KEY} {found}, this version reads {FORMAT}: it was written by "
            f"another optimizer, or by another version of this one. Load the model's weights alone, and let "
            f"the optimizer begin anew: it needs nothing of another's state"
        )
    check_keys(saved, STEP_KEY, EPOCH_KEY)
    for key, least in ((STEP_KEY, 0), (EPOCH_KEY, 0), (SHARDS_KEY, 1)):
        value: Any = saved.get(key)
        if key == SHARDS_KEY and value is None:
            continue
        single = isinstance(value, numbers.Real) or (torch.is_tensor(value) and value.numel() == 1)
        if not single or not value >= least or value % 1 != 0:
            raise ValueError(
                f"{key} in the checkpoint must be a whole number >= {least}, not {value!r}: take a whole "
                f"state_dict()"
            )


def check_state(
    state: dict[str, Any],
    elementwise: dict[str, tuple[int, ...]],
    required: Iterable[str],
    way_out: str,
    plan: GroupPlan,
    index: int,
    shards: int | None = None,
) -> None:
    """Hold one parameter's state against the plan.

    Args:
        state: as saved; an empty one stands for a parameter that nothing was saved of.
        elementwise: keys and shapes that may stand there beside the blocks'.
        required: keys among them that a parameter has once it was updated.
        way_out: what to do where one of them is lacking, for the message.
        plan: of the group.
        index: of the parameter in the group.
        shards: that the checkpoint was written with; None: as many as now. With another number the blocks
            are cut differently, and those that are not found again start afresh.

    Raises:
        ValueError: an unknown or lacking key, a missing block, or a value of another type or shape; names the
            parameter.
    """
    name = plan.names[index]
    recut = shards is not None and shards != plan.shards
    expected = dict(elementwise)
    _check_step(name, state, elementwise)
    if state.get("step", 0) > 0:
        for key in required:
            if key not in state:
                # It would begin at 0 beside a step count that its bias correction takes for its own.
                elsewhere = (
                    "among shards only the rank that consolidate_state_dict(to=0) names has it, so load what "
                    "that rank saved; else "
                )
                raise ValueError(
                    f"{name}: the checkpoint lacks {key!r}, which a parameter has after {int(state['step'])} "
                    f"updates: {elsewhere if int(shards or 1) > 1 else ''}{way_out}"
                )
    for held in plan.rows[index]:
        if state and f"block.{held.key}.updates" not in state and not recut:
            raise ValueError(
                f"{name}: the checkpoint lacks the block [{held.key}]. Either blocking or model changed "
                f"since, or it is the state_dict() of one rank, which holds the blocks of that rank alone: "
                f"call consolidate_state_dict() on all ranks before it and save that of the rank it names "
                f"(to=0), or use torch.distributed.checkpoint"
            )
        expected.update(_check_block(name, state, held))
    for key, value in state.items():
        block = BLOCK.fullmatch(key)
        if key not in expected and block is None and key != "step":
            raise ValueError(f"{name}: the checkpoint has the unknown key {key!r}")
        if block is not None and block[1] not in plan.keys[index] and not recut:
            raise ValueError(
                f"{name}: the checkpoint has the unknown key {key!r}; were blocking or model changed since?"
            )
        if key in expected:
            _check_tensor(name, key, value)
            if tuple(value.shape) != expected[key]:
                raise ValueError(
                    f"{name}: {key} has shape {tuple(value.shape)} in the checkpoint, {expected[key]} is "
                    f"needed"
                )


def _check_step(name: str, state: dict[str, Any], elementwise: dict[str, tuple[int, ...]]) -> None:
    if "step" in state:
        _check_number(name, "step", state["step"])
        return
    for key in ELEMENTWISE:
        if key in elementwise and key in state:
            raise ValueError(
                f"{name}: the checkpoint lacks 'step', which {key!r} goes with; take a whole state_dict()"
            )


def _check_block(name: str, state: dict[str, Any], held: PlannedRow) -> dict[str, tuple[int, ...]]:
    """The tensors of a block of this rank with their shapes; empty for a block that is not there."""
    prefix = f"block.{held.key}"
    if f"{prefix}.updates" not in state:
        return {}
    shapes: dict[str, tuple[int, ...]] = {}
    for side, n in enumerate(held.entry.stack.sides):
        shapes[f"{prefix}.statistics.{side}"] = (n, n)
        shapes[f"{prefix}.preconditioner.{side}"] = (n, n)
    if held.entry.stack.averages is not None:
        shapes[f"{prefix}.average"] = held.entry.stack.shape
    under_way = state.get(f"{prefix}.in_flight.steps")
    if under_way is not None:
        _check_tensor(name, f"{prefix}.in_flight.steps", under_way)
        # A schedule with another delay has another number of places.
        places = under_way.numel()
        shapes[f"{prefix}.in_flight.steps"] = (places,)
        for side, n in enumerate(held.entry.stack.sides):
            shapes[f"{prefix}.in_flight.{side}"] = (places, n * (n + 1) // 2)
    for key in (*(f"{prefix}.{number}" for number in _NUMBERS), *shapes):
        if key not in state:
            raise ValueError(
                f"{name}: the checkpoint lacks {key!r}, and has other keys of this block: it is no complete "
                f"state_dict(); take the whole parameter out of it for it to begin anew"
            )
        if key not in shapes:
            _check_number(name, key, state[key])
    return shapes


def _check_number(name: str, key: str, value: Any) -> None:
    if not isinstance(value, numbers.Real) and not (torch.is_tensor(value) and value.numel() == 1):
        raise ValueError(f"{name}: {key} in the checkpoint must be a number, not {value!r}")


def _check_tensor(name: str, key: str, value: Any) -> None:
    if not torch.is_tensor(value):
        raise ValueError(
            f"{name}: {key} in the checkpoint must be a tensor, not {value!r} of type {type(value).__name__}"
        )


def _check_placement(name: str, key: str, parameter: torch.Tensor, saved: Any) -> None:
    """A part of a tensor fits only where the same part is held."""
    if is_dtensor(saved) and local(saved).shape != local(parameter).shape:
        raise ValueError(
            f"{name}: {key} in the checkpoint is one rank's part {tuple(local(saved).shape)} of it, "
            f"{tuple(local(parameter).shape)} is needed: load it with torch.distributed.checkpoint, or save "
            f"after consolidate_state_dict()"
        )
