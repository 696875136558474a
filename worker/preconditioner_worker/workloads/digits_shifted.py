"""Handwritten digits, each at nine positions: enough of them for large batches."""

from __future__ import annotations

import itertools

import torch
from torch import nn
from torch.nn import functional as F

from preconditioner_worker.workloads.base import Batch, Evaluation, WorkloadError
from preconditioner_worker.workloads.digits_batchnorm import DigitsBatchNormWorkload

EMPTY = -5 / 6
"""A pixel without ink, as the digits are scaled."""
SHIFTS = tuple(itertools.product((-1, 0, 1), repeat=2))
"""Rows down and columns to the right."""
TRAINING_IMAGES = 1437 * len(SHIFTS)
CALIBRATION_STRIDE = 4
"""No divisor of 1437, so that the images taken differ from shift to shift."""


class ShiftedDigitsWorkload(DigitsBatchNormWorkload):
    """The network, digits and split of :class:`DigitsBatchNormWorkload`; training images are shifted.

    Each of the 1437 training images is there nine times, shifted by -1, 0 or 1 pixels in either direction
    (what leaves the image is lost, what enters it is empty): 12,933 images. The 360 held-out images are not
    shifted. An epoch is a permutation of all 12,933; its incomplete end is left out.

    An evaluation gives each BatchNorm mean and variance over every fourth training image. Running averages
    lag behind the weights by about ten steps, a third of a run at the largest batches: they would be what
    such a run is measured by.

    Args:
        batch_size: images a step.
        channels: of the first convolution; the second and third have twice as many.

    Raises:
        WorkloadError: a batch is larger than the set.
    """

    name = "digits-shifted"

    def __init__(self, *, batch_size: int = 64, channels: int = 8) -> None:
        if batch_size > TRAINING_IMAGES:
            raise WorkloadError(f"a batch of {batch_size} is more than the {TRAINING_IMAGES} training images")
        super().__init__(batch_size=batch_size, channels=channels)
        images, labels = self.train
        padded = F.pad(images, (1, 1, 1, 1), value=EMPTY)
        rows, columns = images.shape[2:]
        self.train = Batch(
            torch.cat([padded[:, :, 1 - y : 1 - y + rows, 1 - x : 1 - x + columns] for y, x in SHIFTS]),
            labels.repeat(len(SHIFTS)),
        )

    def evaluate(self, model: nn.Module) -> Evaluation:
        """See :class:`Workload`. The model and its running averages are left as they are."""
        # Built anew, since a copy would have the hooks by which an optimizer records what it sees.
        calibrated = self.build_model(seed=0)
        calibrated.load_state_dict(model.state_dict())
        for module in calibrated.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        with torch.no_grad():
            calibrated(self.train.inputs[::CALIBRATION_STRIDE])
        return super().evaluate(calibrated)
