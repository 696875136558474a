"""How many iterations each method takes to solve a toy problem; one iteration has one draw of the noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.func import jacrev

from preconditioner_worker.rivals.curveball import CurveBall
from preconditioner_worker.rivals.toy_problems import ToyProblem, is_solved, loss_of

Solver = Callable[[ToyProblem, Generator, int, float], int | None]
"""From a problem, a source of randomness, the most iterations and a learning rate to the iterations that it
took; None where it did not arrive."""


def curveball(problem: ToyProblem, random: Generator, most: int, lr: float) -> int | None:
    """CurveBall; ``lr`` is the first lambda, which is its only setting."""

    class Residuals(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.Parameter(problem.start(random))

        def forward(self, noise: Tensor) -> Tensor:
            return problem.residuals(self.weights, noise)

    model = Residuals()
    optimizer = CurveBall(model, damping=lr)

    def step() -> Tensor:
        optimizer.step(problem.draw(random), torch.empty(0), lambda residuals, _: residuals.square().sum())
        return model.weights

    return _count(problem, step, most)


def sgd(problem: ToyProblem, random: Generator, most: int, lr: float) -> int | None:
    """SGD with a momentum of 0.9."""
    return _first_order(problem, random, most, lambda weights: torch.optim.SGD([weights], lr, momentum=0.9))


def adam(problem: ToyProblem, random: Generator, most: int, lr: float) -> int | None:
    """Adam."""
    return _first_order(problem, random, most, lambda weights: torch.optim.Adam([weights], lr))


def levenberg_marquardt(problem: ToyProblem, random: Generator, most: int, lr: float) -> int | None:
    """Levenberg-Marquardt; ``lr`` is the first damping.

    It is divided by ten after a success, and multiplied by ten after none. Success
    is judged with the noise of the same iteration. A trial that is rejected is an iteration, too.
    """
    weights, damping = problem.start(random), lr
    jacobian_of = jacrev(problem.residuals)

    def step() -> Tensor:
        nonlocal weights, damping
        noise = problem.draw(random)
        residuals, jacobian = problem.residuals(weights, noise), jacobian_of(weights, noise)
        normal = jacobian.T @ jacobian + damping * torch.eye(len(weights), dtype=weights.dtype)
        trial = weights - torch.linalg.solve(normal, jacobian.T @ residuals)
        if loss_of(problem, trial, noise) < residuals.square().sum():
            weights, damping = trial, damping / 10
        else:
            damping *= 10
        return weights

    return _count(problem, step, most)


def bfgs(problem: ToyProblem, random: Generator, most: int, lr: float) -> int | None:
    """SciPy's BFGS. Where a line search fails it begins anew.

    The noise is drawn anew after every iteration, and SciPy keeps the loss and gradient that the last one
    ended with: a line search compares trials under one draw with a start under the draw before.
    """
    iterations = 0
    weights, noise = problem.start(random).numpy(), problem.draw(random)

    def loss_and_gradient(w: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        leaf = torch.from_numpy(w.copy()).requires_grad_()
        loss = loss_of(problem, leaf, noise)
        (gradient,) = torch.autograd.grad(loss, leaf)
        return loss.item(), gradient.numpy()

    def after(w: NDArray[np.float64]) -> None:
        nonlocal iterations, noise, weights
        iterations, noise, weights = iterations + 1, problem.draw(random), w.copy()
        if iterations >= most or is_solved(problem, torch.from_numpy(weights)):
            raise StopIteration

    while iterations < most and not is_solved(problem, torch.from_numpy(weights)):
        before = iterations
        minimize(loss_and_gradient, weights, jac=True, method="BFGS", callback=after,
                 options={"gtol": 0.0, "maxiter": most})  # fmt: skip
        if iterations == before:
            iterations, noise = iterations + 1, problem.draw(random)
    return iterations if is_solved(problem, torch.from_numpy(weights)) else None


def _first_order(
    problem: ToyProblem, random: Generator, most: int, build: Callable[[Tensor], torch.optim.Optimizer]
) -> int | None:
    weights = problem.start(random).requires_grad_()
    optimizer = build(weights)

    def step() -> Tensor:
        optimizer.zero_grad()
        torch.autograd.backward(loss_of(problem, weights, problem.draw(random)))
        optimizer.step()
        return weights

    return _count(problem, step, most)


def _count(problem: ToyProblem, step: Callable[[], Tensor], most: int) -> int | None:
    for iteration in range(1, most + 1):
        weights = step()
        if not bool(weights.isfinite().all()):
            return None
        if is_solved(problem, weights):
            return iteration
    return None


SOLVERS: Mapping[str, Solver] = {
    "SGD": sgd,
    "Adam": adam,
    "BFGS": bfgs,
    "Levenberg-Marquardt": levenberg_marquardt,
    "CurveBall": curveball,
}

GRIDS: Mapping[str, tuple[float, ...]] = {
    "SGD": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "Adam": (3e-3, 1e-2, 3e-2, 1e-1, 0.3),
    "BFGS": (1.0,),
    "Levenberg-Marquardt": (1e-3, 1e-1, 10.0),
    "CurveBall": (1.0, 10.0),
}
"""What is tried of every method's one setting, on seeds that are not reported."""
