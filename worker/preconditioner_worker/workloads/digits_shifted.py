"""Handwritten digits, each at nine positions: enough of them for large batches."""

from __future__ import annotations

import itertools

import torch
from torch.nn import functional as F

from preconditioner_worker.workloads.base import Batch, WorkloadError
from preconditioner_worker.workloads.digits_batchnorm import DigitsBatchNormWorkload

EMPTY = -5 / 6
"""A pixel without ink, as the digits are scaled."""
SHIFTS = tuple(itertools.product((-1, 0, 1), repeat=2))
"""Rows down and columns to the right."""
TRAINING_IMAGES = 1437 * len(SHIFTS)


class ShiftedDigitsWorkload(DigitsBatchNormWorkload):
    """The network, digits and split of :class:`DigitsBatchNormWorkload`; training images are shifted.

    Each of the 1437 training images is there nine times, shifted by -1, 0 or 1 pixels in either direction
    (what leaves the image is lost, what enters it is empty): 12,933 images. The 360 held-out images are not
    shifted. An epoch is a permutation of all 12,933; its incomplete end is left out.

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
