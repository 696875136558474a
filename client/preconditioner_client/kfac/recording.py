"""Hooks that record inputs and output gradients of layers as backward passes over them.

Nothing is recorded without a backward pass, so evaluations leave no trace, and what is recorded lives as long
as autograd keeps it anyway.

Hooks may be passed by: code that was compiled before does not know them, and who multiplies by a module's
weight without calling the module does not call them. Until a layer has brought something its weight is
watched, so that this is not passed over in silence. A weight's gradient comes after those of its layer's
outputs within the same backward pass, and on this rank only if this rank has used it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from preconditioner_client.kfac.layers import Layer, Layers

logger = logging.getLogger("preconditioner_client")

_NAMED = 3

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
        self._heard: set[str] = set()
        self._missed: set[str] = set()
        self._watched: dict[str, RemovableHandle] = {
            layer.name: layer.weight.register_post_accumulate_grad_hook(self._watch(layer))
            for layer in layers.all
        }
        self._warned = False

    def is_passed_by(self, layer: Layer) -> bool:
        """Whether this rank used the weight since the last step, and the hooks were not called, now or ever.

        They are not called on the other ranks then, either, as these run the same code.
        """
        return layer.name in self._missed and layer.name not in self._heard

    def report_missed(self, trained: Container[torch.Tensor]) -> None:
        """Log once which layers had gradients since the last step, but nothing recorded, now or ever.

        Args:
            trained: weights that the optimizer was given.
        """
        for name in self._heard & self._watched.keys():
            self._watched.pop(name).remove()
        missed = [
            layer.name
            for layer in self.layers.all
            if layer.name in self._missed - self._heard and layer.weight in trained
        ]
        self._missed.clear()
        if not missed or self._warned:
            return
        self._warned = True
        more = f" and {len(missed) - _NAMED} more" if len(missed) > _NAMED else ""
        logger.warning(
            "K-FAC's hooks were not called for %s%s, which had gradients in this step: without factors they "
            "take the gradient's step. If the model was compiled and had run before KFAC was made, call "
            "torch.compiler.reset(), or make KFAC before the first run. A weight that is used without a call "
            "of its module, as that of the out_proj of nn.MultiheadAttention, cannot be preconditioned",
            ", ".join(missed[:_NAMED]),
            more,
        )

    def remove(self) -> None:
        """Take the hooks out of the model. Idempotent."""
        for handle in (*self._handles, *self._watched.values()):
            handle.remove()
        self._handles.clear()
        self._watched.clear()

    def _hook(self, layer: Layer) -> Callable[[Any, Any, Any], None]:
        def after_forward(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
            if not (torch.is_grad_enabled() and torch.is_tensor(output) and output.requires_grad):
                return
            if not inputs or not self.due(layer.weight):
                return
            seen = inputs[0].detach()
            output.register_hook(lambda gradient: self._record(layer, seen, gradient))

        return after_forward

    def _watch(self, layer: Layer) -> Callable[[torch.Tensor], None]:
        def after_gradient(weight: torch.Tensor) -> None:
            if layer.name not in self._heard and self.due(weight):
                self._missed.add(layer.name)

        return after_gradient

    @torch.no_grad()
    def _record(self, layer: Layer, inputs: torch.Tensor, gradient: torch.Tensor) -> None:
        self._heard.add(layer.name)
        with torch.autocast(gradient.device.type, enabled=False):
            gradient = gradient.detach().to(torch.float32)
            if self._grad_scale is not None:
                gradient = gradient / self._grad_scale()
            layer.record(inputs, gradient)
