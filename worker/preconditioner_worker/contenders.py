"""All optimizers that can be trained, tuned and compared, by name: torch's, the client's and the rivals."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

import torch
from pydantic import Field
from torch import nn

from preconditioner_client import (
    KFAC,
    Accumulation,
    AdaptiveRefresh,
    BlockingConfig,
    Grafting,
    GraftingConfig,
    LocalExchange,
    Ridge,
    RootConfig,
    Shampoo,
    StalenessConfig,
    StatisticsConfig,
    attach,
)
from preconditioner_worker.optimizers import (
    AdagradSettings,
    AdamWSettings,
    Decay,
    NonNegative,
    OptimizerSettings,
    Rate,
    Service,
    SGDSettings,
    ShampooSettings,
    exchange,
)
from preconditioner_worker.rivals import LAMB, LARS, CurveBall

Steps: TypeAlias = Annotated[int, Field(ge=1)]


class AdamSettings(OptimizerSettings):
    """torch.optim.Adam; its weight decay is a term of the gradient."""

    name: Literal["adam"] = "adam"
    lr: Rate = 3e-3
    beta1: Decay = 0.9
    beta2: Decay = 0.99
    epsilon: NonNegative = 1e-8

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """See :class:`OptimizerSettings`."""
        return torch.optim.Adam(
            self.groups(model), lr=self.lr, betas=(self.beta1, self.beta2), eps=self.epsilon
        )


class LayerwiseSettings(OptimizerSettings):
    """Of methods with a trust ratio per layer, from which biases and the gains of norms are excluded."""

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """As for other optimizers, and without a trust ratio where there is no weight decay."""
        groups = super().groups(model)
        return [{**group, "trust_ratio": group["params"][0].ndim >= 2} for group in groups]


class LARSSettings(LayerwiseSettings):
    """rivals.LARS."""

    name: Literal["lars"] = "lars"
    lr: Rate = 10.0
    momentum: Decay = 0.9
    weight_decay: NonNegative = 5e-4
    trust_coefficient: Rate = 1e-3

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """See :class:`OptimizerSettings`."""
        return LARS(
            self.groups(model), lr=self.lr, momentum=self.momentum, trust_coefficient=self.trust_coefficient
        )


class LAMBSettings(LayerwiseSettings):
    """rivals.LAMB."""

    name: Literal["lamb"] = "lamb"
    lr: Rate = 1e-2
    weight_decay: NonNegative = 0.01
    beta1: Decay = 0.9
    beta2: Decay = 0.999
    epsilon: NonNegative = 1e-6

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """See :class:`OptimizerSettings`."""
        return LAMB(self.groups(model), lr=self.lr, beta1=self.beta1, beta2=self.beta2, epsilon=self.epsilon)


class CurveBallSettings(OptimizerSettings):
    """rivals.CurveBall; it has no weight decay."""

    name: Literal["curveball"] = "curveball"
    lr: Rate = 1.0
    weight_decay: Annotated[float, Field(ge=0, le=0)] = 0.0
    damping: NonNegative = 10.0
    """lambda at first; it adapts itself."""

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """See :class:`OptimizerSettings`."""
        return CurveBall(model, lr=self.lr, damping=self.damping)


class Shampoo2020Settings(OptimizerSettings):
    """preconditioner_client.Shampoo with the settings published in 2020 (arXiv 2002.09018).

    Summed statistics, exponent -1/(2k) (-1/4 for a matrix, -1/2 for a vocabulary's one side), an EMA of the
    preconditioned gradients, which takes the length of that of AdaGrad's directions, and a linear blend from
    this one; which begins with a block's first version, not at a step.
    """

    name: Literal["shampoo-2020"] = "shampoo-2020"
    lr: Rate = 0.01
    momentum: Annotated[float, Field(gt=0, lt=1)] = 0.9
    """mu of ``m <- mu m + (1 - mu) P_0 G P_1``."""
    blend_steps: Annotated[int, Field(ge=0)] = 1000
    """From a block's first version on."""
    block_size: Steps = 1024
    """Longest side of a block."""
    max_side: Steps | None = 8192
    """Dimensions longer than this are not preconditioned."""
    refresh_every: Steps | None = None
    """Steps between snapshots; null: as soon as the last is back, at most every 10."""
    max_staleness: Steps = 1200
    """Age up to which no step waits."""
    service: Service = "embedded"
    """embedded; host:port of a running service; or local:D: in this process, exactly D steps late."""

    def build(self, model: nn.Module) -> Shampoo:
        """See :class:`OptimizerSettings`."""
        return Shampoo(
            self.groups(model),
            lr=self.lr,
            beta1=0.0,
            momentum=self.momentum,
            dampening=self.momentum,
            momentum_of="preconditioned",
            grafting=GraftingConfig(method=Grafting.ADAGRAD, epsilon=1e-10, blend_steps=self.blend_steps),
            statistics=StatisticsConfig(accumulation=Accumulation.SUM),
            blocking=BlockingConfig(block_size=self.block_size, max_side=self.max_side),
            staleness=StalenessConfig(max_staleness=self.max_staleness, refresh_every=self.refresh_every),
            service=exchange(self.service),
        )


class SynchronousShampooSettings(OptimizerSettings):
    """preconditioner_client.Shampoo with its roots computed in the step itself, every k steps."""

    name: Literal["shampoo-sync"] = "shampoo-sync"
    lr: Rate = 3e-3
    refresh_every: Steps = 20
    """k; all blocks in the same step, from step k on."""
    beta1: Decay = 0.9
    """Decay of the gradient's average."""
    grafting_beta2: Decay = 0.99
    """Decay of Adam's second moment, which gives steps their length."""
    statistics_beta: Decay = 0.99
    """Decay of the statistics' average."""
    exponent: Rate | None = None
    """Of the root; null: 1 / (2k), k the number of preconditioned sides."""
    ridge_value: NonNegative = 1e-6
    """Relative to the largest eigenvalue."""

    def build(self, model: nn.Module) -> Shampoo:
        """See :class:`OptimizerSettings`."""
        return Shampoo(
            self.groups(model),
            lr=self.lr,
            beta1=self.beta1,
            grafting=GraftingConfig(beta2=self.grafting_beta2),
            statistics=StatisticsConfig(beta=self.statistics_beta),
            root=RootConfig(ridge=Ridge(value=self.ridge_value), exponent=self.exponent),
            # A step never waits: the roots are there in the step of their snapshot.
            staleness=StalenessConfig(
                refresh_every=self.refresh_every, max_staleness=self.refresh_every, stagger=False
            ),
            service=LocalExchange(),
        )


class KFACSettings(OptimizerSettings):
    """preconditioner_client.KFAC: linear layers, convolutions, embeddings and BatchNorms."""

    name: Literal["kfac"] = "kfac"
    lr: Rate = 1e-2
    damping: Rate = 1e-2
    """lambda, split over both factors by pi."""
    momentum: Decay = 0.9
    statistics_beta: Decay = 0.95
    """Decay of the factors' average."""
    refresh_every: Steps | None = None
    """Steps between snapshots; null: as soon as the last is back, at most every 10."""
    adaptive_refresh: bool = False
    """Intervals that grow while factors stay the same (SP-NGD, arXiv 2002.06015)."""
    max_staleness: Steps = 200
    """Age up to which no step waits."""
    service: Service = "embedded"
    """embedded; host:port of a running service; or local:D: in this process, exactly D steps late."""

    def build(self, model: nn.Module) -> KFAC:
        """See :class:`OptimizerSettings`."""
        return KFAC(
            model,
            self.groups(model),
            lr=self.lr,
            damping=self.damping,
            momentum=self.momentum,
            statistics=StatisticsConfig(beta=self.statistics_beta),
            staleness=StalenessConfig(max_staleness=self.max_staleness, refresh_every=self.refresh_every),
            adaptive_refresh=AdaptiveRefresh() if self.adaptive_refresh else None,
            service=exchange(self.service),
        )


class AttachedSettings(OptimizerSettings):
    """preconditioner_client.attach before an optimizer of torch; blocks keep the norm of their gradients."""

    statistics_beta: Decay = 0.99
    """Decay of the statistics' average."""
    refresh_every: Steps | None = None
    """Steps between snapshots; null: as soon as the last is back, at most every 10."""
    max_staleness: Steps = 200
    """Age up to which no step waits."""
    service: Service = "embedded"
    """embedded; host:port of a running service; or local:D: in this process, exactly D steps late."""

    @abstractmethod
    def plain(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer before which it is put."""

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """See :class:`OptimizerSettings`; the optimizer keeps what is attached."""
        optimizer = self.plain(model)
        attach(
            optimizer,
            model,
            statistics=StatisticsConfig(beta=self.statistics_beta),
            staleness=StalenessConfig(max_staleness=self.max_staleness, refresh_every=self.refresh_every),
            service=exchange(self.service),
        )
        return optimizer


class AttachedAdamWSettings(AttachedSettings):
    """attach before torch.optim.AdamW, whose moments are then of preconditioned gradients."""

    name: Literal["adamw-attached"] = "adamw-attached"
    lr: Rate = 3e-3
    beta1: Decay = 0.9
    beta2: Decay = 0.99
    epsilon: NonNegative = 1e-8

    def plain(self, model: nn.Module) -> torch.optim.Optimizer:
        """See :class:`AttachedSettings`."""
        return AdamWSettings(
            lr=self.lr,
            weight_decay=self.weight_decay,
            beta1=self.beta1,
            beta2=self.beta2,
            epsilon=self.epsilon,
        ).build(model)


class AttachedSGDSettings(AttachedSettings):
    """attach before torch.optim.SGD with momentum."""

    name: Literal["sgd-attached"] = "sgd-attached"
    lr: Rate = 0.1
    momentum: Decay = 0.9
    nesterov: bool = False

    def plain(self, model: nn.Module) -> torch.optim.Optimizer:
        """See :class:`AttachedSettings`."""
        return SGDSettings(
            lr=self.lr, weight_decay=self.weight_decay, momentum=self.momentum, nesterov=self.nesterov
        ).build(model)


CONTENDERS: Mapping[str, type[OptimizerSettings]] = {
    "adamw": AdamWSettings,
    "adam": AdamSettings,
    "adagrad": AdagradSettings,
    "sgd": SGDSettings,
    "lars": LARSSettings,
    "lamb": LAMBSettings,
    "curveball": CurveBallSettings,
    "shampoo": ShampooSettings,
    "shampoo-2020": Shampoo2020Settings,
    "shampoo-sync": SynchronousShampooSettings,
    "kfac": KFACSettings,
    "adamw-attached": AttachedAdamWSettings,
    "sgd-attached": AttachedSGDSettings,
}

ContenderName: TypeAlias = Literal[
    "adamw",
    "adam",
    "adagrad",
    "sgd",
    "lars",
    "lamb",
    "curveball",
    "shampoo",
    "shampoo-2020",
    "shampoo-sync",
    "kfac",
    "adamw-attached",
    "sgd-attached",
]

AnyContender: TypeAlias = Annotated[
    AdamWSettings
    | AdamSettings
    | AdagradSettings
    | SGDSettings
    | LARSSettings
    | LAMBSettings
    | CurveBallSettings
    | ShampooSettings
    | Shampoo2020Settings
    | SynchronousShampooSettings
    | KFACSettings
    | AttachedAdamWSettings
    | AttachedSGDSettings,
    Field(discriminator="name"),
]
