"""A deep autoencoder of handwritten digits: the classic hard case for first-order methods."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from preconditioner_worker.workloads.base import Batch, Evaluation, Workload, seeded
from preconditioner_worker.workloads.digits import DigitsWorkload

WIDTHS = (64, 128, 64, 32, 8, 32, 64, 128, 64)
GREATEST_PIXEL = 16


class AutoencoderWorkload(Workload):
    """Images of 8 x 8 pass through eight layers, of 128, 64, 32, 8, 32, 64 and 128 units, and come out again.

    The units are tanh, linear in the middle and at the end; pixels are read as probabilities. The loss is the
    cross-entropy of an image less the entropy of its own pixels, so that 0 is a perfect copy; accuracy is the
    share of pixels on the right side of one half.

    Args:
        batch_size: images a step.
    """

    name = "autoencoder"
    metric = "held-out divergence (nats per image)"

    def __init__(self, *, batch_size: int = 64) -> None:
        self._digits = DigitsWorkload(batch_size=batch_size)
        self.held_out = _copied(self._digits.held_out)

    def build_model(self, seed: int) -> nn.Module:
        """See :class:`Workload`."""
        layers: list[nn.Module] = []
        with seeded(seed):
            for inputs, outputs in itertools.pairwise(WIDTHS):
                layer = nn.Linear(inputs, outputs)
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
                layers += [layer, nn.Tanh()]
        del layers[-1], layers[len(WIDTHS) - 2]
        return nn.Sequential(*layers)

    def batch(self, seed: int, step: int) -> Batch:
        """See :class:`Workload`."""
        return _copied(self._digits.batch(seed, step))

    def criterion(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See :class:`Workload`."""
        entropy = F.binary_cross_entropy(targets, targets, reduction="sum")
        return (F.binary_cross_entropy_with_logits(outputs, targets, reduction="sum") - entropy) / len(
            targets
        )

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> Evaluation:
        """See :class:`Workload`."""
        outputs = model(self.held_out.inputs)
        right = (outputs > 0) == (self.held_out.targets > 0.5)
        loss = self.criterion(outputs, self.held_out.targets)
        return Evaluation(loss.item(), right.double().mean().item())


def _copied(batch: Batch) -> Batch:
    """Pixels from 0 to 1, both in and out."""
    pixels = batch.inputs.flatten(1).mul(6).add(5).div(GREATEST_PIXEL).clamp(0, 1)
    return Batch(pixels, pixels)
