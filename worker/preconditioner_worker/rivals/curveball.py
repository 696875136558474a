"""CurveBall: one step of gradient descent on the Newton system, and one on the objective, at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from preconditioner_worker.rivals.checks import Bounds, check_group

BOUNDS: Bounds = {"lr": None, "damping": None}
ADAPT_EVERY = 5
FACTOR = 0.999**ADAPT_EVERY
LOWEST_RATIO, HIGHEST_RATIO = 0.5, 1.5

Criterion = Callable[[Tensor, Tensor], Tensor]
Map = Callable[..., Tensor]
PullBack = Callable[[Tensor], tuple[Tensor, ...]]


class CurveBall(Optimizer):
    """Newton's method with a momentum in place of the inverse (Henriques et al., arXiv 1805.08095).

    With J the Jacobian of the outputs with respect to the weights w, H_L the Hessian of the criterion with
    respect to the outputs, g the gradient and ``H = Jᵀ H_L J + lambda I``::

        dz = H z + g
        z <- rho z - beta dz
        w <- w + lr z

    J is multiplied from the left by reverse mode and from the right by forward mode (``torch.func``), without
    ever being formed. rho and beta minimise the quadratic model ``gᵀ z' + z'ᵀ H z' / 2`` over the plane of z
    and dz, at every step::

        | dzᵀ H dz   zᵀ H dz | |  beta |   | gᵀ dz |
        | zᵀ H dz    zᵀ H z  | | -rho  | = | gᵀ z  |

    where a singular system has its solution of least length: at the first step z is 0, and so is rho.
    Every 5 steps lambda follows from gamma, the change of the batch's loss over that of the model: it is
    divided by 0.999^5 if gamma < 0.5, and multiplied by it if gamma > 1.5.

    Args:
        model: whose parameters are trained; its buffers (of a BatchNorm) are updated once a step.
        lr: of w; 1 as published, so that a schedule of learning rates can be applied.
        damping: lambda >= 0 at first; 1 or 10 as published.

    Raises:
        ValueError: a setting outside of its range.
    """

    def __init__(self, model: nn.Module, *, lr: float = 1.0, damping: float = 10.0) -> None:
        check_group("CurveBall", {"lr": lr, "damping": damping}, BOUNDS)
        self._model = model
        self._names = [name for name, p in model.named_parameters() if p.requires_grad]
        weights = [p for p in model.parameters() if p.requires_grad]
        super().__init__(weights, {"lr": lr, "damping": damping, "step": 0})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """One group only, since rho, beta and lambda are those of all weights together.

        Raises:
            ValueError: it is the second.
        """
        if self.param_groups:
            raise ValueError("CurveBall has one parameter group: rho, beta and lambda are common to all")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, inputs: Tensor, targets: Tensor, criterion: Criterion) -> Tensor:  # type: ignore[override]
        """One update from a batch: CurveBall differentiates the model itself, and reads no ``grad``.

        Args:
            inputs: of the model.
            targets: of the criterion.
            criterion: mean loss from outputs and targets, twice differentiable and convex in the outputs.

        Returns:
            The batch's loss, a scalar, from before the update.
        """
        group = self.param_groups[0]
        weights: list[Tensor] = group["params"]
        z = [self._momentum(w) for w in weights]
        products = GaussNewton(self._model, criterion, self._names, inputs, targets)
        through_z = products.curvature_of_outputs(z)
        gradient = products.gradient
        dz = products.pull_back(through_z.curved)
        for change, momentum, slope in zip(dz, z, gradient, strict=True):
            change.add_(momentum, alpha=group["damping"]).add_(slope)
        rho, beta = optimal_factors(z, dz, gradient, through_z, products, group["damping"])
        torch._foreach_mul_(z, rho)
        torch._foreach_add_(z, dz, alpha=-beta)
        torch._foreach_add_(weights, z, alpha=group["lr"])
        if group["step"] % ADAPT_EVERY == 0:
            # Along z the model's minimum is at lr = 1, so that its change follows from the slope alone.
            predicted = (group["lr"] - group["lr"] ** 2 / 2) * float(inner(gradient, z))
            actual = float(products.loss_at(weights) - products.loss)
            group["damping"] = adapted(group["damping"], actual, predicted)
        group["step"] += 1
        return products.loss

    def _momentum(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        if not state:
            state["z"] = torch.zeros_like(weight, memory_format=torch.preserve_format)
        momentum: Tensor = state["z"]
        return momentum


class Curved(NamedTuple):
    """A direction seen from the outputs: ``J v`` and ``H_L J v``, in the shape of the outputs."""

    outputs: Tensor
    curved: Tensor


class GaussNewton:
    """Products with the Gauss-Newton matrix ``Jᵀ H_L J`` of one batch, by forward and reverse mode.

    Args:
        model: in training mode or not; its buffers are updated as by one forward pass.
        criterion: mean loss from outputs and targets.
        names: of the parameters that vectors run over, in their order.
        inputs: of the batch.
        targets: of the batch.

    Attributes:
        loss: scalar.
        gradient: of the loss, per parameter.
    """

    def __init__(
        self, model: nn.Module, criterion: Criterion, names: list[str], inputs: Tensor, targets: Tensor
    ) -> None:
        parameters = dict(model.named_parameters())
        self._weights = tuple(parameters[name].detach() for name in names)
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}

        def forward(*weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            # Every pass begins with the same running averages, and only the first one's are kept.
            buffers = {name: buffer.clone() for name, buffer in before.items()}
            state = {**dict(zip(names, weights, strict=True)), **buffers}
            # The fused kernels of attention know no forward mode.
            with sdpa_kernel(SDPBackend.MATH):
                outputs: Tensor = functional_call(model, state, (inputs,))
            return outputs, buffers

        def slope_of(outputs: Tensor) -> Tensor:
            slope: Tensor = grad(criterion)(outputs, targets)
            return slope

        self._outputs_of: Map = lambda *weights: forward(*weights)[0]
        self._slope_of: Map = slope_of
        self._loss_of: Map = lambda outputs: criterion(outputs, targets)
        pulled = vjp(forward, *self._weights, has_aux=True)
        self._outputs, self._pull_back, after = cast(tuple[Tensor, PullBack, dict[str, Tensor]], pulled)
        for name, buffer in model.named_buffers():
            buffer.copy_(after[name])
        self.loss: Tensor = self._loss_of(self._outputs)
        self.gradient = self.pull_back(slope_of(self._outputs))

    def curvature_of_outputs(self, vectors: list[Tensor]) -> Curved:
        """``J v`` and ``H_L J v``."""
        pushed = jvp(self._outputs_of, self._weights, tuple(vectors))[1]
        return Curved(pushed, jvp(self._slope_of, (self._outputs,), (pushed,))[1])

    def pull_back(self, outputs: Tensor) -> list[Tensor]:
        """``Jᵀ u`` of u in the shape of the outputs."""
        return list(self._pull_back(outputs))

    def loss_at(self, weights: list[Tensor]) -> Tensor:
        """The batch's loss with other weights."""
        return self._loss_of(self._outputs_of(*weights))


def inner(one: list[Tensor], other: list[Tensor]) -> Tensor:
    """Inner product of two vectors that are held by parameter."""
    return torch.stack([(a * b).sum() for a, b in zip(one, other, strict=True)]).sum()


def optimal_factors(
    z: list[Tensor],
    dz: list[Tensor],
    gradient: list[Tensor],
    through_z: Curved,
    products: GaussNewton,
    damping: float,
) -> tuple[float, float]:
    """rho and beta of the 2 x 2 system."""
    through_dz = products.curvature_of_outputs(dz)
    entries = torch.stack(
        [
            (through_dz.outputs * through_dz.curved).sum() + damping * inner(dz, dz),
            (through_z.outputs * through_dz.curved).sum() + damping * inner(z, dz),
            (through_z.outputs * through_z.curved).sum() + damping * inner(z, z),
            inner(gradient, dz),
            inner(gradient, z),
        ]
    ).tolist()
    return solve(*entries, precision=torch.finfo(z[0].dtype).eps)


def solve(
    dz_dz: float, z_dz: float, z_z: float, g_dz: float, g_z: float, *, precision: float
) -> tuple[float, float]:
    """rho and beta, by the pseudo-inverse of the system scaled to a diagonal of 1.

    Args:
        dz_dz: ``dzᵀ H dz``.
        z_dz: ``zᵀ H dz``.
        z_z: ``zᵀ H z``.
        g_dz: ``gᵀ dz``.
        g_z: ``gᵀ z``.
        precision: relative, of the above; directions that it cannot tell apart count as one.

    Where the system is not finite both are NaN, and the run diverges in sight.
    """
    matrix = np.array([[dz_dz, z_dz], [z_dz, z_z]])
    right = np.array([g_dz, g_z])
    if not (np.isfinite(matrix).all() and np.isfinite(right).all()):
        return float("nan"), float("nan")
    lengths = np.sqrt(np.maximum(matrix.diagonal(), 0))
    scale = np.divide(1, lengths, out=np.zeros(2), where=lengths > 0)
    inverse = np.linalg.pinv(matrix * np.outer(scale, scale), rcond=10 * precision, hermitian=True)
    beta, minus_rho = scale * (inverse @ (scale * right))
    return float(-minus_rho), float(beta)


def adapted(damping: float, change: float, predicted: float) -> float:
    """lambda after a comparison of the loss's change with the model's; both are negative as a rule."""
    if predicted == 0:
        return damping
    gamma = change / predicted
    if gamma < LOWEST_RATIO:
        return damping / FACTOR
    return damping * FACTOR if gamma > HIGHEST_RATIO else damping
