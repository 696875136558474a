"""The optimizer of each run: the client's own Shampoo with a deterministic exchange, and the others.

Shampoo has the settings published in 2020 (arXiv 2002.09018): preconditioned gradients are averaged,
``m <- mu m + (1 - mu) P_0 G P_1``, and m takes the length of the same average of AdaGrad's directions.
"""

from __future__ import annotations

import torch
from torch import nn

from preconditioner_client import (
    Accumulation,
    BlockingConfig,
    Grafting,
    GraftingConfig,
    LocalExchange,
    ServiceConfig,
    Shampoo,
    StalenessConfig,
    StalePolicy,
    StatisticsConfig,
)
from preconditioner_client.exchange import Exchange
from preconditioner_worker.optimizers import AdagradSettings, AdamWSettings
from preconditioner_worker.staleness.controls import (
    FirstOnlyExchange,
    LateExchange,
    NothingExchange,
    RotatedExchange,
)
from preconditioner_worker.staleness.specs import RANDOM_INTERVAL, RunSpec, StudySettings

Service = str | ServiceConfig | Exchange


def build(
    spec: RunSpec,
    settings: StudySettings,
    lr: float,
    model: nn.Module,
    *,
    max_side: int,
    service: Service | None = None,
) -> torch.optim.Optimizer:
    """The optimizer of a run.

    Args:
        spec: which.
        settings: of the study.
        lr: peak learning rate.
        model: whose parameters it trains.
        max_side: sides longer than this are not preconditioned (vocabularies, as published).
        service: of an arm, in place of roots in this process.

    AdamW decays no weights, as Shampoo here does not.
    """
    if spec.method == "adamw":
        return AdamWSettings(lr=lr).build(model)
    if spec.method == "adagrad":
        return AdagradSettings(lr=lr).build(model)
    staleness, exchange = _exchange(spec, settings.steps)
    return Shampoo(
        model.named_parameters(),
        lr=lr,
        beta1=0.0,
        momentum=settings.momentum,
        dampening=settings.momentum,
        momentum_of="preconditioned",
        grafting=GraftingConfig(
            method=Grafting.NONE if spec.grafting is False else Grafting.ADAGRAD,
            epsilon=1e-10,
            blend_steps=settings.blend_steps,
        ),
        statistics=StatisticsConfig(
            accumulation=Accumulation(spec.statistics or "sum"), beta=settings.ema_beta
        ),
        blocking=BlockingConfig(max_side=max_side),
        staleness=staleness,
        service=exchange if service is None else service,
    )


def _exchange(spec: RunSpec, steps: int) -> tuple[StalenessConfig, Exchange]:
    if spec.arm is not None:
        # Roots are computed at once, and the client's own schedule holds them back.
        return spec.arm.staleness(), LocalExchange()
    interval = {"frozen": spec.n, "late": 1}.get(spec.method) or RANDOM_INTERVAL
    config = StalenessConfig(
        refresh_every=interval, max_staleness=max(interval, steps), policy=StalePolicy.KEEP, stagger=False
    )
    if spec.method == "frozen":
        return config, FirstOnlyExchange(delay=1)
    if spec.method == "random":
        return config, RotatedExchange(spec.seed)
    if spec.method == "late":
        return config, LateExchange(2 * (spec.n or 1))
    return config, NothingExchange()
