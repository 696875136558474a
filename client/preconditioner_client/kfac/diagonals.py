"""Statistics that are vectors: how often an embedding's rows come, and the Fisher of BatchNorm.

They are small, so all replicas keep them, as ``diagonal_statistics`` in the state of the layer's weight. Its
last entry is the weight that the EMA has on what it has seen; divided by it, the others are averages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from preconditioner_client.config import StatisticsConfig
from preconditioner_client.distribution import Ranks
from preconditioner_client.guard import Guard
from preconditioner_client.kfac.layers import Layer, Layers, MatrixLayer
from preconditioner_client.kfac.reduction import sum_over_replicas

KEY = "diagonal_statistics"


class DiagonalStatistics:
    """Keeps them in the state of an optimizer.

    Args:
        layers: of the model.
        states: gives the optimizer's state, by parameter.
    """

    def __init__(self, layers: Layers, states: Callable[[], Any]) -> None:
        self._states = states
        self._lengths: dict[torch.Tensor, int] = {
            layer.weight: 3 * layer.weight.numel() for layer in layers.batch_norms
        }
        self._lengths.update(
            {layer.weight: layer.weight.shape[0] for layer in layers.matrices if layer.is_embedding}
        )

    def shapes(self, parameter: torch.Tensor) -> dict[str, tuple[int, ...]]:
        """What the state of a parameter has of this."""
        length = self._lengths.get(parameter)
        return {} if length is None else {KEY: (length + 1,)}

    def estimate(self, weight: torch.Tensor) -> torch.Tensor | None:
        """The averages of a layer; None before there are any."""
        kept = self._states().get(weight, {}).get(KEY)
        # Before the first batch all is 0.
        return None if kept is None else kept[:-1] / kept[-1].clamp_min(torch.finfo(kept.dtype).tiny)

    def fold(
        self,
        layers: Sequence[Layer],
        settings: Mapping[torch.Tensor, StatisticsConfig],
        ranks: Ranks,
        guard: Guard | None,
    ) -> None:
        """``s <- beta s + (1 - beta) x`` with the averages x over the batches of all replicas. Collective.

        Args:
            layers: that are due, the same on all replicas.
            settings: by weight.
            ranks: of the replicas.
            guard: the verdict on the step's gradients, where the host does not know it.
        """
        wanted = [layer for layer in layers if layer.weight in self._lengths]
        sums = [self._batch(layer) for layer in wanted]
        sum_over_replicas(sums, ranks)
        for layer, total in zip(wanted, sums, strict=True):
            state = self._states()[layer.weight]
            if KEY not in state:
                state[KEY] = torch.zeros_like(total)
            # A state dict may have been loaded in another dtype.
            kept = state[KEY] = state[KEY].to(total.dtype)
            new = total / total[-1]
            good = new.sum().isfinite()  # no replica has a batch: 0 / 0
            if guard is not None:
                good = good & guard.bad.logical_not()
            config = settings[layer.weight]
            mixed = torch.lerp(kept, new, 1 - config.beta)
            if not config.bias_correction:
                mixed[-1] = 1.0
            kept.copy_(torch.where(good, mixed, kept))

    def _batch(self, layer: Layer) -> torch.Tensor:
        """Sums over this rank's batches, and the number of examples."""
        sums = layer.weight.new_zeros(self._lengths[layer.weight] + 1, dtype=torch.float32)
        if isinstance(layer, MatrixLayer):
            if layer.factors is not None:
                sums[:-1] = layer.factors.input
                sums[-1] = layer.factors.examples
        elif layer.fisher is not None:
            sums[:-1] = layer.fisher[1].view(-1)
            sums[-1] = layer.fisher[0]
        return sums
