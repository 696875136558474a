"""Handwritten digits with a convolutional network with BatchNorm."""

from __future__ import annotations

from torch import nn

from preconditioner_worker.workloads.base import seeded
from preconditioner_worker.workloads.digits import DigitsWorkload


class DigitsBatchNormWorkload(DigitsWorkload):
    """The digits, their split and batches of :class:`DigitsWorkload`; every convolution has a BatchNorm.

    Args:
        batch_size: images a step.
        channels: of the first convolution; the second and third have twice as many.
    """

    name = "digits-batchnorm"

    def build_model(self, seed: int) -> nn.Module:
        """See :class:`Workload`."""
        narrow, wide = self._channels, 2 * self._channels
        with seeded(seed):
            return nn.Sequential(
                # The BatchNorm has a bias of its own.
                nn.Conv2d(1, narrow, 3, padding=1, bias=False),
                nn.BatchNorm2d(narrow),
                nn.ReLU(),
                nn.Conv2d(narrow, wide, 3, padding=1, stride=2, bias=False),
                nn.BatchNorm2d(wide),
                nn.ReLU(),
                nn.Conv2d(wide, wide, 3, padding=1, bias=False),
                nn.BatchNorm2d(wide),
                nn.ReLU(),
                nn.AdaptiveAvgPool2d(2),
                nn.Flatten(),
                nn.Linear(4 * wide, 10),
            )
