"""What optimizers with a learning rate per layer share: checked groups, and the step around the rule."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from preconditioner_worker.rivals.checks import Bounds, check_group, dense_gradients


class LayerwiseOptimizer(Optimizer, ABC):
    """An update rule over the parameters of one group at a time."""

    bounds: ClassVar[Bounds]
    """Of the settings of a group."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group.

        Raises:
            ValueError: a setting outside of its range.
        """
        check_group(type(self).__name__, {**self.defaults, **param_group}, self.bounds)
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update; returns the closure's loss.

        Raises:
            ValueError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights, gradients = dense_gradients(type(self).__name__, group)
            if weights:
                self._update(group, weights, gradients)
        return loss

    @abstractmethod
    def _update(self, group: dict[str, Any], weights: list[Tensor], gradients: list[Tensor]) -> None:
        """Change the weights in place."""
