"""Optimizers by name: typed settings that build themselves for a model."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, Literal, TypeAlias

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from torch import nn

from preconditioner_client import (
    BlockingConfig,
    GraftingConfig,
    LocalExchange,
    Ridge,
    RootConfig,
    Shampoo,
    StalenessConfig,
    StatisticsConfig,
)
from preconditioner_client.config import Accumulation, Grafting, RidgeKind, StalePolicy
from preconditioner_client.exchange import Exchange

Rate: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Decay: TypeAlias = Annotated[float, Field(ge=0, lt=1)]
NonNegative: TypeAlias = Annotated[float, Field(ge=0, allow_inf_nan=False)]

LOCAL = "local:"
"""Prefix of a ``service`` that is none: roots in process, delivered exactly that many steps later."""


def _known_service(service: str) -> str:
    if service.startswith(LOCAL) and not service.removeprefix(LOCAL).isdecimal():
        raise ValueError(f"{service!r} needs a number of steps, as in 'local:10'")
    if service != "embedded" and ":" not in service:
        raise ValueError(f"{service!r} is none of 'embedded', 'host:port' and 'local:STEPS'")
    return service


Service: TypeAlias = Annotated[str, AfterValidator(_known_service)]


def exchange(service: Service) -> str | Exchange:
    """What an optimizer takes as its ``service``."""
    return LocalExchange(delay=int(service.removeprefix(LOCAL))) if service.startswith(LOCAL) else service


class OptimizerSettings(BaseModel):
    """Hyperparameters of one optimizer; ``name`` tells the classes apart in JSON."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: str
    lr: Rate
    """Peak learning rate."""
    weight_decay: NonNegative = 0.0
    """Of tensors with two or more dimensions; gains and biases are never decayed."""

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Parameter groups: matrices and higher with weight decay, the rest without."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    @abstractmethod
    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer for ``model``."""


class AdamWSettings(OptimizerSettings):
    """torch.optim.AdamW: the baseline to beat."""

    name: Literal["adamw"] = "adamw"
    lr: Rate = 3e-3
    beta1: Decay = 0.9
    beta2: Decay = 0.99
    epsilon: NonNegative = 1e-8

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """See :class:`OptimizerSettings`."""
        return torch.optim.AdamW(
            self.groups(model), lr=self.lr, betas=(self.beta1, self.beta2), eps=self.epsilon
        )


class AdagradSettings(OptimizerSettings):
    """torch.optim.Adagrad."""

    name: Literal["adagrad"] = "adagrad"
    lr: Rate = 1e-2
    epsilon: NonNegative = 1e-10

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """See :class:`OptimizerSettings`."""
        return torch.optim.Adagrad(self.groups(model), lr=self.lr, eps=self.epsilon)


class SGDSettings(OptimizerSettings):
    """torch.optim.SGD with momentum."""

    name: Literal["sgd"] = "sgd"
    lr: Rate = 0.1
    momentum: Decay = 0.9
    nesterov: bool = False

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """See :class:`OptimizerSettings`."""
        return torch.optim.SGD(self.groups(model), lr=self.lr, momentum=self.momentum, nesterov=self.nesterov)


class ShampooSettings(OptimizerSettings):
    """preconditioner_client.Shampoo, its settings flattened for a command line."""

    name: Literal["shampoo"] = "shampoo"
    lr: Rate = 3e-3
    """Peak learning rate."""
    beta1: Decay = 0.9
    """Decay of the gradient's average."""
    momentum: Decay = 0.0
    """Over the preconditioned updates."""
    nesterov: bool = False
    """Look-ahead form of the momentum."""
    grafting: Literal["none", "sgd", "adagrad", "rmsprop", "adam"] = "adam"
    """Diagonal method that gives steps their length."""
    grafting_beta2: Decay = 0.99
    """Decay of the diagonal method's second moment."""
    accumulation: Literal["ema", "sum"] = "ema"
    """Of the statistics."""
    statistics_beta: Decay = 0.99
    """Decay of the statistics' average."""
    ridge: Literal["relative", "absolute", "trace", "pseudo_inverse"] = "relative"
    """How a spectrum is conditioned before its root."""
    ridge_value: NonNegative = 1e-6
    """How much."""
    exponent: Rate | None = None
    """Of the root; null: 1 / (2k), k the number of preconditioned sides."""
    block_size: Annotated[int, Field(ge=1)] = 1024
    """Longest side of a block."""
    merge_dims: bool = True
    """Merge small dimensions before blocks are cut."""
    max_side: Annotated[int, Field(ge=1)] | None = 8192
    """Dimensions longer than this are not preconditioned."""
    refresh_every: Annotated[int, Field(ge=1)] | None = None
    """Steps between snapshots; null: as soon as the last is back, at most every 10."""
    max_staleness: Annotated[int, Field(ge=1)] = 200
    """Age up to which no step waits."""
    policy: Literal["wait", "graft", "keep"] = "wait"
    """What a step does beyond that age."""
    service: Service = "embedded"
    """embedded; host:port of a running service; or local:D: in this process, exactly D steps late."""

    def build(self, model: nn.Module) -> Shampoo:
        """See :class:`OptimizerSettings`."""
        return Shampoo(
            self.groups(model),
            lr=self.lr,
            beta1=self.beta1,
            momentum=self.momentum,
            nesterov=self.nesterov,
            grafting=GraftingConfig(method=Grafting(self.grafting), beta2=self.grafting_beta2),
            statistics=StatisticsConfig(
                accumulation=Accumulation(self.accumulation), beta=self.statistics_beta
            ),
            blocking=BlockingConfig(
                block_size=self.block_size, merge_dims=self.merge_dims, max_side=self.max_side
            ),
            root=RootConfig(
                ridge=Ridge(kind=RidgeKind(self.ridge), value=self.ridge_value), exponent=self.exponent
            ),
            staleness=StalenessConfig(
                max_staleness=self.max_staleness,
                refresh_every=self.refresh_every,
                policy=StalePolicy(self.policy),
            ),
            service=exchange(self.service),
        )
