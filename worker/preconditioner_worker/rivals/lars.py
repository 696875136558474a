"""LARS: momentum whose learning rate is scaled, layer by layer, by the ratio of weights to gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from preconditioner_client import Grafting, GraftingConfig
from preconditioner_client.grafting import directions
from preconditioner_worker.rivals.checks import Bounds, check_group, dense_gradients

BOUNDS: Bounds = {"lr": None, "momentum": 1.0, "weight_decay": None, "trust_coefficient": None}


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling (You, Gitman, Ginsburg, arXiv 1708.03888, algorithm 1).

    For each parameter w with gradient g::

        l = eta ||w|| / (||g|| + beta ||w||)
        v <- m v + lr l (g + beta w)
        w <- w - v

    The learning rate is inside the velocity, and the decay ``beta ||w||`` inside the denominator, as
    published. Where ``||w||`` or the denominator is 0, l is 1.

    Args:
        params: parameters or groups. A group with ``trust_ratio=False`` (biases and the parameters of norms,
            by convention) is updated with l = 1; give it ``weight_decay=0`` as well.
        lr: global learning rate >= 0.
        momentum: m in [0, 1).
        weight_decay: beta >= 0.
        trust_coefficient: eta > 0.
        trust_ratio: whether l is computed.

    Raises:
        ValueError: a setting outside of its range, or (from :meth:`step`) a sparse gradient.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        *,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        trust_coefficient: float = 1e-3,
        trust_ratio: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "trust_ratio": trust_ratio,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group."""
        check_group("LARS", {**self.defaults, **param_group}, BOUNDS)
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights, gradients = dense_gradients("LARS", group)
            if not weights:
                continue
            velocities = [self._velocity(w) for w in weights]
            torch._foreach_mul_(velocities, group["momentum"])
            torch._foreach_add_(velocities, _scaled(group, gradients, weights), alpha=group["lr"])
            torch._foreach_sub_(weights, velocities)
        return loss

    def _velocity(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        if not state:
            state["velocity"] = torch.zeros_like(weight, memory_format=torch.preserve_format)
        velocity: Tensor = state["velocity"]
        return velocity


def _scaled(group: dict[str, Any], gradients: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    """``l (g + beta w)`` of every parameter."""
    if not group["trust_ratio"]:
        return list(torch._foreach_add(gradients, weights, alpha=group["weight_decay"]))
    # The client grafts with the same formula.
    config = GraftingConfig(method=Grafting.LARS, trust_coefficient=group["trust_coefficient"])
    return directions(config, gradients, [], [], weights, group["weight_decay"])
