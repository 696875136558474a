"""What may stand in a parameter group."""

from __future__ import annotations

from typing import Any

from preconditioner_client.config import BlockingConfig, GraftingConfig, RootConfig, StatisticsConfig
from preconditioner_client.gradients import check_parameter

_GROUP_KEYS = {
    "params",
    "param_names",
    "lr",
    "initial_lr",
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


def check_group(group: dict[str, Any]) -> None:
    """Refuse settings outside of their range, unknown keys, and parameters that cannot be trained.

    Raises:
        ValueError: with what was given, and what is possible.
    """
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
    known = {
        "grafting": GraftingConfig,
        "statistics": StatisticsConfig,
        "blocking": BlockingConfig,
        "root": RootConfig,
    }
    for key, kind in known.items():
        if not isinstance(group[key], kind):
            raise ValueError(f"{key} must be a {kind.__name__}, not {group[key]!r}")
    unknown = set(group) - set(known) - _GROUP_KEYS
    if unknown:
        raise ValueError(f"unknown key in a parameter group: {sorted(unknown)}; known: {sorted(_GROUP_KEYS)}")
    for index, parameter in enumerate(group["params"]):
        names = group.get("param_names")
        check_parameter(parameter, str(names[index]) if names else f"parameter {index}")
