"""Small degenerate least-squares problems on which first-order methods crawl."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

GOAL = 1e-4
"""A problem is solved where its noiseless loss is below this."""


class ToyProblem(Protocol):
    """Minimise the sum of squared residuals, in float64."""

    @property
    def name(self) -> str:
        """As in tables."""

    def start(self, random: Generator) -> Tensor:
        """Weights before the first step, (n,)."""

    def draw(self, random: Generator) -> Tensor:
        """The noise of one step; of shape () or, where there is none, a constant."""

    def residuals(self, weights: Tensor, noise: Tensor) -> Tensor:
        """(m,) from weights (n,)."""


def loss_of(problem: ToyProblem, weights: Tensor, noise: Tensor) -> Tensor:
    """Sum of squared residuals."""
    return problem.residuals(weights, noise).square().sum()


def is_solved(problem: ToyProblem, weights: Tensor) -> bool:
    """Whether the noiseless loss is below the goal."""
    with torch.no_grad():
        return float(loss_of(problem, weights, torch.ones((), dtype=torch.float64))) < GOAL


@dataclass(frozen=True)
class Rosenbrock:
    """Residuals ``(e 10 (x2 - x1²), 1 - x1)`` with e drawn anew at every step; starts are in [-½, ½]².

    Attributes:
        noise: upper end of e's uniform distribution from 0; None: e is 1.
    """

    noise: float | None = None

    @property
    def name(self) -> str:
        """See :class:`ToyProblem`."""
        return "Rosenbrock" if self.noise is None else f"Rosenbrock, U[0, {self.noise:g}]"

    def start(self, random: Generator) -> Tensor:
        """See :class:`ToyProblem`."""
        return torch.from_numpy(random.uniform(-0.5, 0.5, size=2))

    def draw(self, random: Generator) -> Tensor:
        """See :class:`ToyProblem`."""
        return torch.tensor(1.0 if self.noise is None else random.uniform(0, self.noise), dtype=torch.float64)

    def residuals(self, weights: Tensor, noise: Tensor) -> Tensor:
        """See :class:`ToyProblem`."""
        x1, x2 = weights
        return torch.stack([noise * 10 * (x2 - x1**2), 1 - x1])


class DegenerateLinear:
    """A product of two matrices fitted to one of condition 10⁵ (Rahimi and Recht).

    Residuals ``(W1 W2 - A) x / sqrt(N)`` for N = 100 fixed normal inputs x of size 6, with W1 10 x 6,
    W2 6 x 6 and A 10 x 6 with singular values from 1 to 10⁻⁵, evenly on a logarithmic scale. The weights
    start normal with variance 1/6.
    """

    name = "degenerate linear"
    _outputs, _inputs, _samples = 10, 6, 100

    def __init__(self) -> None:
        random = np.random.default_rng(6)
        left, _ = np.linalg.qr(random.normal(size=(self._outputs, self._inputs)))
        right, _ = np.linalg.qr(random.normal(size=(self._inputs, self._inputs)))
        self._target = torch.from_numpy(left * np.logspace(0, -5, self._inputs) @ right.T)
        self._x = torch.from_numpy(random.normal(size=(self._inputs, self._samples)))

    def start(self, random: Generator) -> Tensor:
        """See :class:`ToyProblem`."""
        size = (self._outputs + self._inputs) * self._inputs
        return torch.from_numpy(random.normal(size=size) / self._inputs**0.5)

    def draw(self, random: Generator) -> Tensor:
        """See :class:`ToyProblem`."""
        return torch.ones((), dtype=torch.float64)

    def residuals(self, weights: Tensor, noise: Tensor) -> Tensor:
        """See :class:`ToyProblem`."""
        outer, inner = weights.view(-1, self._inputs).split([self._outputs, self._inputs])
        error = (outer @ inner - self._target) @ self._x
        residuals: Tensor = noise * error.flatten() / self._samples**0.5
        return residuals


PROBLEMS: Mapping[str, ToyProblem] = {
    problem.name: problem for problem in (Rosenbrock(), Rosenbrock(1.0), Rosenbrock(3.0), DegenerateLinear())
}
