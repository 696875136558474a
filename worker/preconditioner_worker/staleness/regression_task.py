"""Regression on what a fixed network says of ill-conditioned inputs: a step of it takes a millisecond or two.

Exactly specified, without any data: inputs, noise and the teacher's weights are drawn by NumPy's generators.
Examples are new at every step, so that nothing overfits. Directions matter because the inputs' variance falls
with the cube of their rank, in a basis that is not that of the weights; a diagonal method cannot undo that.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from preconditioner_worker.staleness.specs import StudySettings
from preconditioner_worker.staleness.task import Task
from preconditioner_worker.workloads.base import Batch, generator, seeded

_INPUTS = 32
_TEACHER_WIDTHS = (_INPUTS, 16, 16, 16)
_STUDENT_WIDTHS = (_INPUTS, 32, 32, 16)
_TEACHER, _BASIS, _HELD_OUT = (0xFACE, 0), (0xFACE, 1), (0xFACE, 2)
"""Seeds, of two numbers as those of batches are: no run should have the seed 0xFACE."""


class RegressionTask(Task):
    """Outputs of a teacher with noise (32 inputs, 16 and 16 tanh, 16 outputs), by a student twice as wide.

    With a student of the teacher's own shape runs of one seed end in different optima, whatever the delay. An
    input is ``z S Q``: z standard normal (32), S diagonal with ``s_i`` proportional to i^-1.5 and a mean
    square of 1, Q a random orthogonal matrix. The teacher's weights and biases are uniform in
    ±2/sqrt(inputs of the layer), twice as wide as the student's at its start.

    Args:
        batch_size: examples a step.
        held_out: examples of an evaluation.
        noise: standard deviation of each output's noise in training; evaluations have none.
    """

    name = "regression"
    metric = "held-out excess loss (nats per example)"
    about = (
        "the 16 outputs of a fixed random network (two hidden layers of 16) for 32 inputs of a power-law "
        "spectrum, with noise of 0.3, by a network twice as wide; 32 examples a step; the loss is half the "
        "squared error, in nats but for a constant, and held-out without noise"
    )
    max_side = 128
    settings = StudySettings(task=name, steps=100_000, evaluate_every=500, drift_every=997)

    def __init__(self, *, batch_size: int = 32, held_out: int = 4096, noise: float = 0.3) -> None:
        self._batch_size, self._noise = batch_size, noise
        spectrum = np.arange(1, _INPUTS + 1) ** -1.5
        spectrum *= math.sqrt(_INPUTS) / np.linalg.norm(spectrum)
        q, r = np.linalg.qr(generator(*_BASIS).standard_normal((_INPUTS, _INPUTS)))
        # (inputs, inputs); with the signs of R's diagonal Q is uniform.
        self._mixing = spectrum[:, None] * (q * np.sign(np.diagonal(r)))
        rng = generator(*_TEACHER)
        self._teacher = [
            (rng.uniform(-1, 1, (a, b)) * 2 / math.sqrt(a), rng.uniform(-1, 1, b) * 2 / math.sqrt(a))
            for a, b in itertools.pairwise(_TEACHER_WIDTHS)
        ]
        self._held_out = self._examples(generator(*_HELD_OUT), held_out, noise=0.0)

    @classmethod
    @cache
    def open(cls) -> RegressionTask:
        """As specified above."""
        return cls()

    @property
    def data_digest(self) -> str:
        """See :class:`Task`; of the numbers drawn, as linear algebra rounds differently elsewhere."""
        drawn = [generator(*_HELD_OUT).standard_normal(64), *itertools.chain(*self._teacher)]
        return hashlib.sha256(b"".join(numbers.tobytes() for numbers in drawn)).hexdigest()[:16]

    def _examples(self, rng: np.random.Generator, count: int, *, noise: float) -> Batch:
        inputs = rng.standard_normal((count, _INPUTS)) @ self._mixing
        outputs = inputs
        for number, (weight, bias) in enumerate(self._teacher):
            outputs = (np.tanh(outputs) if number else outputs) @ weight + bias
        targets = outputs + noise * rng.standard_normal(outputs.shape)
        return Batch(torch.from_numpy(inputs).float(), torch.from_numpy(targets).float())

    def build_model(self, seed: int) -> nn.Module:
        """See :class:`Task`."""
        with seeded(seed):
            first, *others = (nn.Linear(a, b) for a, b in itertools.pairwise(_STUDENT_WIDTHS))
            return nn.Sequential(first, *(layer for linear in others for layer in (nn.Tanh(), linear)))

    def batch(self, seed: int, step: int) -> Batch:
        """See :class:`Task`."""
        return self._examples(generator(seed, step), self._batch_size, noise=self._noise)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Half the squared error of an example, averaged over the batch."""
        errors: Tensor = model(batch.inputs) - batch.targets  # (batch, outputs)
        return 0.5 * errors.square().sum(dim=1).mean()

    def held_out_loss(self, model: nn.Module) -> float:
        """See :class:`Task`."""
        with torch.no_grad():
            return float(self.loss(model, self._held_out))
