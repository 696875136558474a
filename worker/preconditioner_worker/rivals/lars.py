"""LARS: momentum whose learning rate is scaled, layer by layer, by the ratio of weights to gradient."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from preconditioner_client import Grafting, GraftingConfig
from preconditioner_client.grafting import directions
from preconditioner_worker.rivals.checks import Bounds
from preconditioner_worker.rivals.layerwise import LayerwiseOptimizer


class LARS(LayerwiseOptimizer):
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

    bounds: ClassVar[Bounds] = {"lr": None, "momentum": 1.0, "weight_decay": None, "trust_coefficient": None}

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

    def _update(self, group: dict[str, Any], weights: list[Tensor], gradients: list[Tensor]) -> None:
        velocities = [self._velocity(w) for w in weights]
        torch._foreach_mul_(velocities, group["momentum"])
        torch._foreach_add_(velocities, _scaled(group, gradients, weights), alpha=group["lr"])
        torch._foreach_sub_(weights, velocities)

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
