"""Hooks that record inputs and output gradients of layers as backward passes over them.

Nothing is recorded without a backward pass, so evaluations leave no trace, and what is recorded lives as long
as autograd keeps it anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from preconditioner_client.kfac.layers import Layer, Layers

GradScale = Callable[[], float | torch.Tensor]
"""What the loss is multiplied by at the time, a number or 0-D."""


class Recorder:
    """Records every layer in every backward pass while it is due.

    Args:
        layers: of the model.
        grad_scale: what the loss is multiplied by at the time.

    Attributes:
        due: whether the layer with this weight is recorded for the next step.
    """

    def __init__(self, layers: Layers, grad_scale: GradScale | None) -> None:
        self.layers = layers
        self.due: Callable[[torch.Tensor], bool] = lambda _: True
        self._grad_scale = grad_scale
        self._handles: list[RemovableHandle] = [
            layer.module.register_forward_hook(self._hook(layer)) for layer in layers.all
        ]

    def remove(self) -> None:
        """Take the hooks out of the model. Idempotent."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, layer: Layer) -> Callable[[Any, Any, Any], None]:
        def after_forward(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
            if not (torch.is_grad_enabled() and torch.is_tensor(output) and output.requires_grad):
                return
            if not inputs or not self.due(layer.weight):
                return
            seen = inputs[0].detach()
            output.register_hook(lambda gradient: self._record(layer, seen, gradient))

        return after_forward

    @torch.no_grad()
    def _record(self, layer: Layer, inputs: torch.Tensor, gradient: torch.Tensor) -> None:
        with torch.autocast(gradient.device.type, enabled=False):
            gradient = gradient.detach().to(torch.float32)
            if self._grad_scale is not None:
                gradient = gradient / self._grad_scale()
            layer.record(inputs, gradient)
