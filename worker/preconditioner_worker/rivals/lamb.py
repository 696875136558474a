"""LAMB: Adam whose step is scaled, layer by layer, to the length of the weights."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from preconditioner_client import Grafting, GraftingConfig
from preconditioner_client.grafting import directions, update_second_moments
from preconditioner_worker.rivals.checks import Bounds
from preconditioner_worker.rivals.layerwise import LayerwiseOptimizer


class LAMB(LayerwiseOptimizer):
    """Layer-wise adaptive moments (You et al., arXiv 1904.00962, algorithm 2), with phi the identity.

    For each parameter w with gradient g, at its t-th update::

        m <- beta1 m + (1 - beta1) g          m̂ = m / (1 - beta1^t)
        v <- beta2 v + (1 - beta2) g²         v̂ = v / (1 - beta2^t)
        r = m̂ / (sqrt(v̂) + eps) + lambda w
        w <- w - lr ||w|| / ||r|| r

    The decay is part of r and so of its norm, and ``||w||`` is not clamped, as published. The ratio is 1
    where either norm is 0.

    Args:
        params: parameters or groups. A group with ``trust_ratio=False`` (biases and the parameters of norms,
            by convention) is updated with the ratio 1; give it ``weight_decay=0`` as well.
        lr: learning rate >= 0.
        beta1: decay of the first moment, in [0, 1).
        beta2: decay of the second moment, in [0, 1).
        epsilon: >= 0.
        weight_decay: lambda >= 0.
        trust_ratio: whether the ratio is computed.

    Raises:
        ValueError: a setting outside of its range, or (from :meth:`step`) a sparse gradient.
    """

    bounds: ClassVar[Bounds] = {"lr": None, "beta1": 1.0, "beta2": 1.0, "epsilon": None, "weight_decay": None}

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        *,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-6,
        weight_decay: float = 0.01,
        trust_ratio: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "beta1": beta1,
            "beta2": beta2,
            "epsilon": epsilon,
            "weight_decay": weight_decay,
            "trust_ratio": trust_ratio,
        }
        super().__init__(params, defaults)

    def _update(self, group: dict[str, Any], weights: list[Tensor], gradients: list[Tensor]) -> None:
        updates = torch._foreach_mul(self._directions(group, gradients, weights), group["lr"])
        torch._foreach_sub_(weights, updates)

    def _directions(
        self, group: dict[str, Any], gradients: list[Tensor], weights: list[Tensor]
    ) -> list[Tensor]:
        """What is subtracted, but for the learning rate."""
        states = [self._state(w) for w in weights]
        steps = []
        for state in states:
            state["step"] += 1
            steps.append(int(state["step"]))
        first, second = ([state[moment] for state in states] for moment in ("first", "second"))
        # The client grafts with the same formulas; without the ratio LAMB is Adam.
        ratio = group["trust_ratio"]
        config = GraftingConfig(
            method=Grafting.LAMB if ratio else Grafting.ADAM, beta2=group["beta2"], epsilon=group["epsilon"]
        )
        torch._foreach_lerp_(first, gradients, 1 - group["beta1"])
        update_second_moments(config, second, gradients)
        corrected = list(torch._foreach_div(first, [1 - group["beta1"] ** t for t in steps]))
        result = directions(config, corrected, second, steps, weights, group["weight_decay"])
        if not ratio:
            torch._foreach_add_(result, weights, alpha=group["weight_decay"])
        return result

    def _state(self, weight: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[weight]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["first"] = torch.zeros_like(weight, memory_format=torch.preserve_format)
            state["second"] = torch.zeros_like(weight, memory_format=torch.preserve_format)
        return state
