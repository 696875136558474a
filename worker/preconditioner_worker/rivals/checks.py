"""What an optimizer refuses: settings out of range, and gradients that it has no formula for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

from torch import Tensor

Bounds: TypeAlias = Mapping[str, float | None]
"""Settings that are finite and not negative, and what they stay below, where there is such a bound."""


def check_group(optimizer: str, group: Mapping[str, Any], bounds: Bounds) -> None:
    """Refuse settings out of range.

    Raises:
        ValueError: names the setting, its value and what it may be.
    """
    for name, upper in bounds.items():
        value = float(group[name])
        if not (math.isfinite(value) and value >= 0 and (upper is None or value < upper)):
            allowed = "finite and >= 0" if upper is None else f"in [0, {upper:g})"
            raise ValueError(f"{optimizer}: {name} must be {allowed}, not {group[name]}")


def dense_gradients(optimizer: str, group: Mapping[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters of a group that have a gradient, and the gradients.

    Raises:
        ValueError: a gradient is sparse.
    """
    weights = [parameter for parameter in group["params"] if parameter.grad is not None]
    gradients = [weight.grad for weight in weights]
    if any(gradient.is_sparse for gradient in gradients):
        raise ValueError(f"{optimizer} has no formula for sparse gradients; use nn.Embedding(sparse=False)")
    return weights, gradients
