"""What a training task must offer, so that every optimizer meets exactly the same one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn


class WorkloadError(ValueError):
    """A task cannot be built from what was given; the message says what to give instead."""


class Batch(NamedTuple):
    """One mini-batch."""

    inputs: Tensor
    targets: Tensor


class Evaluation(NamedTuple):
    """Quality on held-out data.

    Attributes:
        loss: mean held-out loss, in the workload's unit. Not finite after a divergence.
        accuracy: share of predictions that are right.
    """

    loss: float
    accuracy: float


class Workload(Protocol):
    """A model, its data and its measure.

    Model and batches are functions of seeds alone: two optimizers that run with the same seed start from the
    same weights and see the same batches in the same order. Outputs and criterion are apart, because
    Gauss-Newton methods differentiate them separately.

    Attributes:
        name: as used on the command line and in results.
        metric: what :meth:`evaluate` measures, with its unit, as an axis label.
    """

    name: str
    metric: str

    def build_model(self, seed: int) -> nn.Module:
        """A freshly initialised model on the CPU, in float32."""

    def batch(self, seed: int, step: int) -> Batch:
        """The batch of training step ``step`` (from 0)."""

    def criterion(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of a batch from the model's outputs."""

    def evaluate(self, model: nn.Module) -> Evaluation:
        """Loss and accuracy over all held-out data, always the same and in the same order."""


def generator(*entropy: int) -> np.random.Generator:
    """A random generator that depends on the integers given and on nothing else."""
    return np.random.default_rng(entropy)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Let torch draw from ``seed`` inside; its state outside is untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def evaluate_batches(workload: Workload, model: nn.Module, batches: list[Batch]) -> Evaluation:
    """Mean loss and accuracy over ``batches``, weighted by their numbers of targets."""
    was_training = model.training
    model.eval()
    loss, right, count = 0.0, 0, 0
    for inputs, targets in batches:
        outputs = model(inputs)
        loss += workload.criterion(outputs, targets).item() * targets.numel()
        right += int((outputs.argmax(dim=-1) == targets).sum())
        count += targets.numel()
    model.train(was_training)
    mean = loss / count
    return Evaluation(mean if math.isfinite(mean) else math.nan, right / count)
