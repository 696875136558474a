"""What may stand in a parameter group."""

from __future__ import annotations

from typing import Any

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
    "name",
    "lr_scale",
}
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
    for key in ("lr", "beta1", "momentum", "dampening", "weight_decay"):
        check_number(key, group[key])
        group[key] = python_number(group[key])
    lr = float(group["lr"])
    if not lr > 0:
        raise ValueError(f"lr must be > 0, not {lr}; schedulers may lower it to 0 later")
    if not 0 <= group["beta1"] < 1:
        raise ValueError(f"beta1 must be in [0, 1), not {group['beta1']}")
    for key in ("momentum", "dampening", "weight_decay"):
        if not group[key] >= 0:
            raise ValueError(f"{key} must be >= 0, not {group[key]}")
    if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
        raise ValueError("nesterov needs momentum > 0 and dampening 0")
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
