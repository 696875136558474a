"""The preconditioner inside an optimizer that the user already has.

:func:`attach` registers step hooks. Just before the user's optimizer reads its gradients they are
preconditioned and given the length of a diagonal method's direction, in place; the optimizer then does with
them what it always does. With ``GraftingConfig(method="sgd")`` (default) every block keeps the norm of its
gradient, so learning rates, clipping and weight decay keep their meaning. A closure given to ``step``, as
Lightning does, is evaluated first of all, and the optimizer gets the loss that it returned.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import nn
from torch.optim import Optimizer

from preconditioner_client.attached_groups import AttachedGroup, AttachedGroups, GroupConfig
from preconditioner_client.attachment import Attachment
from preconditioner_client.config import (
    BlockingConfig,
    Grafting,
    GraftingConfig,
    RootConfig,
    StalenessConfig,
    StatisticsConfig,
)
from preconditioner_client.distribution import AUTO, DistributedConfig
from preconditioner_client.engine import Engine
from preconditioner_client.exchange import Exchange
from preconditioner_client.gradients import check_parameter
from preconditioner_client.options import check_number, config
from preconditioner_client.plan import GroupSettings
from preconditioner_client.preconditioned_optimizer import PreconditionedOptimizer
from preconditioner_client.service_config import ServiceConfig

logger = logging.getLogger("preconditioner_client")


def attach(
    optimizer: Optimizer,
    model: nn.Module | None = None,
    *,
    grafting: GraftingConfig | None = None,
    statistics: StatisticsConfig | None = None,
    blocking: BlockingConfig | None = None,
    root: RootConfig | None = None,
    groups: Mapping[int, GroupConfig | None] | None = None,
    staleness: StalenessConfig | None = None,
    service: str | ServiceConfig | Exchange | None = None,
    job: str | None = None,
    distributed: str | DistributedConfig = AUTO,
) -> Attachment:
    """Put the asynchronous preconditioner before an existing optimizer.

    To go on from a checkpoint, attach before ``optimizer.load_state_dict``: without a preconditioner attached
    torch drops the state of one that was saved. Attached to an optimizer that has made steps, the
    preconditioner starts without statistics, and says so in the log.

    Args:
        optimizer: any torch optimizer that evaluates a closure at most once in a step, as all but ``LBFGS``.
        model: only for the names of its parameters in messages and at the service.
        grafting: what length a preconditioned block is given; default the gradient's own (``sgd``).
        statistics: how the Kronecker statistics are accumulated.
        blocking: how parameters are cut.
        root: ridge and exponent.
        groups: by their number in ``optimizer.param_groups`` the groups that differ, those that are yet to
            come included: a :class:`GroupConfig` with what they have of their own, or None for a group that
            is left alone. That one keeps its gradients to the bit, has no statistics, and may hold sparse
            gradients and complex parameters. But a step is one: NaN or infinity in its gradients refuses the
            step for all groups, or on an accelerator makes it one without effect, its own gradients set to
            zero.
        staleness: refresh interval, bound, adoption and policy.
        service: as for ``Shampoo``.
        job: name of this training job at the service.
        distributed: as for ``Shampoo``.

    Returns:
        The handle: ``metrics()``, ``detach()``, ``state_dict()``, ``estimate_memory()``.

    Raises:
        ValueError: a setting of another type, a parameter that cannot be preconditioned, an optimizer that
            has one attached already, that is one of this package, or that evaluates its closure many times.
        ExchangeError: the service refuses this trainer for good.
    """
    if not isinstance(optimizer, Optimizer):
        raise ValueError(
            f"optimizer must be a torch.optim.Optimizer, not {type(optimizer).__name__}: "
            f"attach(optimizer, model)"
        )
    if model is not None and not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module or None, not {type(model).__name__}")
    if isinstance(optimizer, PreconditionedOptimizer):
        raise ValueError(
            f"{type(optimizer).__name__} preconditions by itself, and would do it twice: attach() is for "
            f"other optimizers, as torch.optim.AdamW"
        )
    if getattr(optimizer, "_attached_preconditioner", None) is not None:
        raise ValueError("this optimizer has a preconditioner attached already: detach() that one first")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            "LBFGS evaluates its closure many times in a step, each with gradients of its own, which an "
            "attached preconditioner does not see: use another optimizer"
        )
    names: dict[torch.Tensor, str] = {}
    if model is not None:
        names.update({p: name for name, p in model.named_parameters()})
    common = AttachedGroup(
        grafting=config("grafting", grafting, GraftingConfig(method=Grafting.SGD)),
        blocks=GroupSettings(
            blocking=config("blocking", blocking, BlockingConfig()),
            statistics=config("statistics", statistics, StatisticsConfig()),
            root=config("root", root, RootConfig()),
        ),
    )
    settings = AttachedGroups(common, groups)
    staleness = config("staleness", staleness, StalenessConfig())
    for number, group in enumerate(optimizer.param_groups):
        for key in {"lr", "weight_decay"} & group.keys():
            if group[key] is not None:  # Adafactor finds its own
                check_number(key, group[key])
        if not settings[number].left_alone:
            for index, parameter in enumerate(group["params"]):
                check_parameter(parameter, names.get(parameter, f"parameter {index}"))
    engine = Engine(staleness, service, job, distributed)
    # Adagrad makes its state before the first step.
    if any(bool(state.get("step", 1)) for state in optimizer.state.values()):
        logger.warning(
            "%s has state already, and the preconditioner attached to it starts without any: to go on from a "
            "checkpoint call attach() before load_state_dict(), which otherwise drops what was saved of the "
            "preconditioner",
            type(optimizer).__name__,
        )
    return Attachment(optimizer, engine, settings, names)
