"""K-FAC as a ``torch.optim.Optimizer`` whose inverses are computed elsewhere.

For each layer with the gradient dW of its matrix (arXiv 1503.05671, arXiv 1811.12019):

1. Hooks record inputs and output gradients; ``A <- beta A + (1 - beta) E[a aᵀ]`` and likewise ``G``, see
   :mod:`preconditioner_client.kfac.factors`. Among several ranks both go to the layer's owner.
2. Snapshots that are due leave for the service; versions that came back are taken into use.
3. ``u = (G + sqrt(l) / pi I)^-1 dW (A + pi sqrt(l) I)^-1`` as of its version, see
   :mod:`preconditioner_client.kfac.factor_stack`. A layer without a usable version takes dW itself.
   BatchNorm: ``(F_c + l I)^-1 (ds_c, db_c)`` for every channel c.
4. Momentum over u, weight decay, ``w <- w - lr u``.
"""

from __future__ import annotations

import enum
import math
from typing import Any, Literal, cast

import torch
from torch import nn

from preconditioner_client.averaging import averages_first
from preconditioner_client.config import (
    Accumulation,
    Adoption,
    BlockingConfig,
    Grafting,
    GraftingConfig,
    Ridge,
    RidgeKind,
    RootConfig,
    StalenessConfig,
    StatisticsConfig,
)
from preconditioner_client.distribution import AUTO, DistributedConfig
from preconditioner_client.exchange import Exchange
from preconditioner_client.kfac.adaptive_refresh import AdaptiveRefresh
from preconditioner_client.kfac.diagonals import DiagonalStatistics
from preconditioner_client.kfac.engine import Direction, LayerEngine
from preconditioner_client.kfac.factors import diagonal_direction, unit_wise_direction
from preconditioner_client.kfac.layers import find_layers
from preconditioner_client.kfac.memory import estimate_memory
from preconditioner_client.kfac.recording import GradScale
from preconditioner_client.memory import MemoryEstimate
from preconditioner_client.options import check_number, config
from preconditioner_client.preconditioned_optimizer import PreconditionedOptimizer
from preconditioner_client.service_config import ServiceConfig


class BatchNormFisher(str, enum.Enum):
    """How the Fisher of a BatchNorm is approximated."""

    UNIT_WISE = "unit_wise"
    DIAGONAL = "diagonal"
    NONE = "none"


_DIRECTIONS: dict[BatchNormFisher, Direction | None] = {
    BatchNormFisher.UNIT_WISE: unit_wise_direction,
    BatchNormFisher.DIAGONAL: diagonal_direction,
    BatchNormFisher.NONE: None,
}


class KFAC(PreconditionedOptimizer):
    """K-FAC, preconditioned asynchronously or in process.

    Knows Linear, Conv1d, Conv2d, Embedding and BatchNorm, where a weight is used by one module; all other
    parameters take the step of the gradient. The loss must be the mean over the batch.

    Args:
        model: its layers get hooks. It may be wrapped in ``DistributedDataParallel`` now or later.
        params: parameters, named parameters or groups, as for every torch optimizer; default all of the
            model. ``lr``, ``momentum``, ``dampening``, ``nesterov``, ``weight_decay``,
            ``decoupled_weight_decay``, ``maximize``, ``grafting``, ``statistics`` and ``blocking`` may differ
            between groups. A layer's blocks follow the group of its weight.
        lr: learning rate > 0; a float or a tensor.
        damping: lambda > 0, split over both factors by pi.
        momentum: heavy-ball factor over the preconditioned updates, as in ``torch.optim.SGD``.
        dampening: of the momentum.
        nesterov: look-ahead form of the momentum.
        weight_decay: factor.
        decoupled_weight_decay: ``w <- (1 - lr weight_decay) w`` rather than a term in the gradient.
        maximize: ascend instead of descend.
        batch_norm: ``"unit_wise"`` (SP-NGD: a 2 x 2 matrix for each channel), ``"diagonal"`` or ``"none"``.
        grafting: a diagonal method whose step length every layer takes, but for BatchNorm, which has its own;
            default none, as published.
        statistics: decay of the factors' EMA, and how often they are taken; default ``beta=0.95``.
        blocking: layers with longer sides are cut, and only the factors' diagonal blocks are kept.
        staleness: refresh interval, bound, adoption and policy, as for Shampoo.
        adaptive_refresh: intervals that follow how fast factors change; None: constant ones.
        service: as for Shampoo. ``LocalExchange()`` inverts in process, on the rank that owns the layer,
            within the step.
        job: name of this training job at the service.
        distributed: as for Shampoo; parameters must not be sharded.
        factor_dtype: in which replicas send factors to their owner: ``torch.float16`` (default, each factor
            scaled by its largest value), ``torch.bfloat16`` or ``torch.float32``.
        grad_scale: returns what the loss is multiplied by before backward: ``scaler.get_scale`` with a
            ``GradScaler``, ``lambda: 1 / k`` with gradients accumulated over k batches. Called for
            every layer; on an accelerator a tensor is better, as the host waits for a number.

    Raises:
        ValueError: a setting outside of its range, a model without any layer that is known, statistics as a
            sum, or what :class:`Shampoo` refuses.
        ExchangeError: the service could not be started, or refuses this trainer for good.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Any = None,
        lr: float | torch.Tensor = 3e-3,
        *,
        damping: float = 1e-2,
        momentum: float = 0.9,
        dampening: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = True,
        maximize: bool = False,
        batch_norm: BatchNormFisher | Literal["unit_wise", "diagonal", "none"] = BatchNormFisher.UNIT_WISE,
        grafting: GraftingConfig | None = None,
        statistics: StatisticsConfig | None = None,
        blocking: BlockingConfig | None = None,
        staleness: StalenessConfig | None = None,
        adaptive_refresh: AdaptiveRefresh | None = None,
        service: str | ServiceConfig | Exchange | None = None,
        job: str | None = None,
        distributed: str | DistributedConfig = AUTO,
        factor_dtype: torch.dtype = torch.float16,
        grad_scale: GradScale | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(
                f"model must be a torch.nn.Module, whose layers get hooks, not {type(model).__name__}; "
                f"parameters come second: KFAC(model, model.parameters())"
            )
        staleness = config("staleness", staleness, StalenessConfig())
        direction = _direction(batch_norm)
        _check(damping, factor_dtype, staleness, adaptive_refresh)
        layers = find_layers(model)
        if not layers.all:
            raise ValueError(
                f"{type(model).__name__} has no layer that K-FAC knows (Linear, Conv1d, Conv2d, Embedding, "
                f"BatchNorm, with a weight of its own): train it with Shampoo"
            )
        self._layers = layers
        self._diagonals = DiagonalStatistics(layers, lambda: self.state)
        defaults = {
            "lr": lr,
            "beta1": 0.0,
            "momentum": momentum,
            "dampening": dampening,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
            "grafting": config("grafting", grafting, GraftingConfig(method=Grafting.NONE)),
            "statistics": config("statistics", statistics, StatisticsConfig(beta=0.95)),
            "blocking": config("blocking", blocking, BlockingConfig()),
            "root": RootConfig(ridge=Ridge(kind=RidgeKind.ABSOLUTE, value=math.sqrt(damping)), exponent=1.0),
        }
        super().__init__(
            model.named_parameters() if params is None else params,
            defaults,
            lambda: LayerEngine(
                layers,
                grad_scale,
                self._diagonals,
                damping,
                direction,
                factor_dtype,
                adaptive_refresh,
                staleness,
                service,
                job,
                distributed,
            ),
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, also in the middle of training.

        Raises:
            ValueError: as for the constructor.
        """
        statistics = config("statistics", param_group.get("statistics"), self.defaults["statistics"])
        if statistics.accumulation is not Accumulation.EMA:
            raise ValueError("K-FAC's factors are averages: statistics accumulation must be 'ema', not 'sum'")
        if param_group.get("root", self.defaults["root"]) != self.defaults["root"]:
            raise ValueError("K-FAC has no root per group: its exponent is 1, its ridge follows from damping")
        if averages_first(param_group):
            raise ValueError("momentum_of='preconditioned' is Shampoo's: leave it out of K-FAC's groups")
        super().add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As for every optimizer; what was recorded of batches that came to no step is dropped, too."""
        self._layers.forget_batches()
        super().zero_grad(set_to_none)

    def metrics(self) -> dict[str, Any]:
        """As ``Shampoo.metrics``, with ``layers`` and ``factor_bytes_sent`` (to other ranks)."""
        return super().metrics()

    def estimate_memory(self, *, replicas: int | None = None, replica: int = 0) -> MemoryEstimate:
        """As ``Shampoo.estimate_memory``, with the factors that hooks record.

        What depends on the batch is not in it: copies of a layer's inputs and output gradients while its
        hook runs, see :mod:`preconditioner_client.kfac.memory`.

        Args:
            replicas: see ``Shampoo.estimate_memory``.
            replica: see ``Shampoo.estimate_memory``.

        Raises:
            ValueError: ``replica`` is none of ``replicas``, or a parameter is sharded.
        """
        self._take_cycled_momentum()
        engine = cast(LayerEngine, self._engine)
        return estimate_memory(self.param_groups, engine, self._layers, self._diagonals, replicas, replica)

    def own_state_shapes(self, parameter: torch.Tensor) -> dict[str, tuple[int, ...]]:
        """See :class:`PreconditionedOptimizer`."""
        return self._diagonals.shapes(parameter)


def _direction(batch_norm: str) -> Direction | None:
    try:
        return _DIRECTIONS[BatchNormFisher(batch_norm)]
    except ValueError:
        known = ", ".join(repr(member.value) for member in BatchNormFisher)
        raise ValueError(f"batch_norm must be one of {known}, not {batch_norm!r}") from None


def _check(
    damping: float, factor_dtype: torch.dtype, staleness: StalenessConfig, adaptive: AdaptiveRefresh | None
) -> None:
    check_number("damping", damping)
    if not (damping > 0 and math.isfinite(damping)):
        raise ValueError(f"damping must be finite and > 0, not {damping}")
    if factor_dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(
            f"factor_dtype must be torch.float16, torch.bfloat16 or torch.float32, not {factor_dtype}"
        )
    if adaptive is not None and staleness.adoption is not Adoption.EAGER:
        raise ValueError(
            "adaptive_refresh has no fixed schedule: give StalenessConfig(adoption='eager'), or leave it out"
        )
