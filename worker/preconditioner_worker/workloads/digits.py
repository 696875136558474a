"""Handwritten digits (scikit-learn's set) with a small convolutional network: tensors of order four."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from preconditioner_worker.workloads.base import Batch, Evaluation, evaluate_batches, generator, seeded

HELD_OUT = 360  # of 1797 images
SPLIT_SEED = 1797  # of the split alone: it is the same for every run


class DigitsWorkload:
    """A convolutional network that tells ten digits apart, on images of 8 x 8.

    Args:
        batch_size: images a step.
        channels: of the first convolution; the second has twice as many.
    """

    name = "digits"
    metric = "held-out loss (nats per image)"

    def __init__(self, *, batch_size: int = 64, channels: int = 16) -> None:
        images, labels = load_digits(return_X_y=True)
        order = np.random.default_rng(SPLIT_SEED).permutation(len(images))
        # Pixels run from 0 to 16; about 5 on average.
        inputs = torch.from_numpy(images[order].astype(np.float32)).view(-1, 1, 8, 8).sub_(5).div_(6)
        targets = torch.from_numpy(labels[order].astype(np.int64))
        self.held_out = Batch(inputs[:HELD_OUT], targets[:HELD_OUT])
        self.train = Batch(inputs[HELD_OUT:], targets[HELD_OUT:])
        self._batch_size = batch_size
        self._channels = channels

    def build_model(self, seed: int) -> nn.Module:
        """See :class:`Workload`."""
        channels = self._channels
        with seeded(seed):
            return nn.Sequential(
                nn.Conv2d(1, channels, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(channels, 2 * channels, 3, padding=1, stride=2),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(2 * channels * 16, 64),
                nn.ReLU(),
                nn.Linear(64, 10),
            )

    def batch(self, seed: int, step: int) -> Batch:
        """See :class:`Workload`. Every epoch is a permutation of its own; its incomplete end is left out."""
        epoch, position = divmod(step, len(self.train.targets) // self._batch_size)
        order = generator(seed, epoch).permutation(len(self.train.targets))
        rows = torch.from_numpy(order[position * self._batch_size : (position + 1) * self._batch_size])
        return Batch(self.train.inputs[rows], self.train.targets[rows])

    def criterion(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See :class:`Workload`."""
        return F.cross_entropy(outputs, targets)

    def evaluate(self, model: nn.Module) -> Evaluation:
        """See :class:`Workload`."""
        return evaluate_batches(self, model, [self.held_out])
