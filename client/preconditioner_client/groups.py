"""What may stand in a parameter group."""

from __future__ import annotations

import math
import numbers
from typing import Any

from preconditioner_client.averaging import PRECONDITIONED, averages_first, check_order, order_of
from preconditioner_client.config import BlockingConfig, GraftingConfig, RootConfig, StatisticsConfig
from preconditioner_client.gradients import check_parameter
from preconditioner_client.options import check_number, python_number

_GROUP_KEYS = {
    "params",
    "param_names",
    "lr",
    "beta1",
    "momentum",
    "dampening",
    "nesterov",
    "weight_decay",
    "decoupled_weight_decay",
    "maximize",
    "momentum_of",
    "name",
    "lr_scale",
}
_NUMBERS = ("lr", "beta1", "momentum", "dampening", "weight_decay")
_SWITCHES = ("nesterov", "decoupled_weight_decay", "maximize")
_CONFIGS = {
    "grafting": GraftingConfig,
    "statistics": StatisticsConfig,
    "blocking": BlockingConfig,
    "root": RootConfig,
}
# What schedulers and load_state_dict() of torch leave in a group, and state_dict() here. A group may be a
# copy of another, and gets what came to the defaults.
_LEFT_KEYS = {
    "initial_lr",
    "max_lr",
    "min_lr",
    "base_lr",
    "max_momentum",
    "base_momentum",
    "swa_lr",
    "differentiable",
    "preconditioner_format",
    "preconditioner_step",
    "preconditioner_epoch",
    "preconditioner_shards",
}


def check_group(group: dict[str, Any]) -> None:
    """Refuse settings outside of their range, unknown keys, and parameters that cannot be trained.

    Numbers of numpy become Python's in the group, so that a run computes with the same type after it was
    resumed from a checkpoint, which has no others.

    Raises:
        ValueError: with what was given, and what is possible.
    """
    for key in _NUMBERS:
        check_number(key, group[key])
        group[key] = python_number(group[key])
    lr = float(group["lr"])
    if not lr > 0:
        raise ValueError(f"lr must be > 0, not {lr}; schedulers may lower it to 0 later")
    _check_ranges(group)
    if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
        raise ValueError("nesterov needs momentum > 0 and dampening 0")
    check_order(group)
    if averages_first(group) and not group["momentum"] > 0:
        raise ValueError(
            f"momentum_of={PRECONDITIONED!r} needs momentum > 0, not {group['momentum']}; 0.9 with dampening "
            f"0.9 is as published"
        )
    for key, kind in _CONFIGS.items():
        if not isinstance(group[key], kind):
            raise ValueError(f"{key} must be a {kind.__name__}, not {group[key]!r}")
    known = _GROUP_KEYS | set(_CONFIGS)
    unknown = set(group) - known - _LEFT_KEYS
    if unknown:
        raise ValueError(f"unknown key in a parameter group: {sorted(unknown)}; known: {sorted(known)}")
    for index, parameter in enumerate(group["params"]):
        names = group.get("param_names")
        check_parameter(parameter, str(names[index]) if names else f"parameter {index}")


def check_saved_group(saved: dict[str, Any], group: dict[str, Any], number: int) -> None:
    """Refuse a checkpoint's group that the next step could not compute with.

    Unlike :func:`check_group` it takes whatever learning rate a scheduler may have come to, and unknown keys
    that the running group has, too, as from a scheduler of somebody else.

    Args:
        saved: the group of the checkpoint.
        group: that takes its place.
        number: of the group, for messages.

    Raises:
        ValueError: a setting is lacking, unknown, or outside of its range; names it.
    """
    where = f"state_dict['param_groups'][{number}]"
    for key in (*_NUMBERS, *_SWITCHES):
        if key not in saved:
            raise ValueError(
                f"the checkpoint lacks the setting {key!r} of group {number}: take a whole state_dict(), or "
                f"put the value that it was saved with into {where}; the optimizer has {group[key]!r}"
            )
    unknown = sorted(map(str, set(saved) - _GROUP_KEYS - set(_CONFIGS) - _LEFT_KEYS - set(group)))
    if unknown:
        raise ValueError(
            f"the checkpoint has unknown keys in group {number}: {unknown}. Take them out of {where} if "
            f"nothing needs them; else put them into the optimizer's group before loading"
        )
    try:
        for key in _NUMBERS:
            check_number(key, saved[key])
            if not math.isfinite(float(saved[key])):
                raise ValueError(f"{key} must be finite, not {saved[key]}")
        _check_ranges(saved)
        for key in _SWITCHES:
            if not isinstance(saved[key], numbers.Real):
                raise ValueError(f"{key} must be True or False, not {saved[key]!r}")
        check_order(saved)
    except ValueError as error:
        raise ValueError(f"group {number} of the checkpoint: {error}; mend it in {where}") from None
    if order_of(saved) != order_of(group):
        raise ValueError(
            f"group {number} of the checkpoint was saved with momentum_of={order_of(saved)!r}, the optimizer "
            f"has {order_of(group)!r}: make it with the saved one, since neither order's averages are the "
            f"other's"
        )


def _check_ranges(group: dict[str, Any]) -> None:
    if not 0 <= group["beta1"] < 1:
        raise ValueError(f"beta1 must be in [0, 1), not {group['beta1']}")
    for key in ("momentum", "dampening", "weight_decay"):
        if not group[key] >= 0:
            raise ValueError(f"{key} must be >= 0, not {group[key]}")
