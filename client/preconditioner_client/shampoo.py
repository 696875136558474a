"""Shampoo as a ``torch.optim.Optimizer`` whose matrix roots are computed elsewhere.

For each block of a parameter with gradient G (arXiv 1802.09568, arXiv 2002.09018):

1. ``S_i <- beta S_i + (1 - beta) G_(i) G_(i)ᵀ`` for every preconditioned side i (or the sum).
2. Snapshots that are due leave for the service; versions that came back are taken into use.
3. ``m <- beta1 m + (1 - beta1) G``, bias-corrected; d the grafted diagonal direction of m.
4. ``u = P_0 m P_1 ..`` with ``P_i = (S_i + ridge I)^(-1/(2k))`` as of its version, scaled to the length of d.
   A block without a usable version takes d itself.
5. Momentum over u, decoupled weight decay, ``w <- w - lr u``.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch

from preconditioner_client.averaging import GRAFTED
from preconditioner_client.config import (
    BlockingConfig,
    GraftingConfig,
    RootConfig,
    StalenessConfig,
    StatisticsConfig,
)
from preconditioner_client.distribution import AUTO, DistributedConfig
from preconditioner_client.engine import Engine
from preconditioner_client.exchange import Exchange
from preconditioner_client.memory import MemoryEstimate, estimate_memory
from preconditioner_client.options import config
from preconditioner_client.plan import GroupSettings
from preconditioner_client.preconditioned_optimizer import PreconditionedOptimizer
from preconditioner_client.service_config import ServiceConfig


class Shampoo(PreconditionedOptimizer):
    """Shampoo with grafting, preconditioned asynchronously.

    Args:
        params: parameters, named parameters or groups, as for every torch optimizer. All keyword arguments
            but ``staleness``, ``service`` and ``job`` may differ between groups.
        lr: learning rate > 0; a float or a tensor.
        beta1: decay of the gradient's EMA, bias-corrected; 0 turns it off.
        momentum: heavy-ball factor over the preconditioned updates, as in ``torch.optim.SGD``.
        dampening: of the momentum.
        momentum_of: what it averages. ``"grafted"``: updates that have their length, as above.
            ``"preconditioned"``: gradients before they are grafted, as published in 2020, see
            :mod:`preconditioner_client.averaging`; it takes the memory of another moment.
        nesterov: look-ahead form of the momentum.
        weight_decay: factor.
        decoupled_weight_decay: ``w <- (1 - lr weight_decay) w`` (AdamW) rather than a term in the gradient.
        maximize: ascend instead of descend.
        grafting: the diagonal method whose step lengths are taken.
        statistics: how the Kronecker statistics are accumulated.
        blocking: how parameters are cut.
        root: ridge and exponent.
        staleness: refresh interval, bound, adoption and policy.
        service: ``"embedded"`` (default) for a private service beside this process, ``"host:port"`` or a
            :class:`ServiceConfig` for a running one, or any :class:`Exchange`.
        job: name of this training job at the service; default from host and process. Under several ranks the
            first one's is taken.
        distributed: ``"auto"`` (default): if ``torch.distributed`` is in use, plain parameters are taken for
            replicas, as ``DistributedDataParallel`` makes them, and ``DTensor`` parameters (``fully_shard``)
            for what their mesh says; ranks whose weights differ are refused. ``"off"``: every rank trains a
            model of its own. A :class:`DistributedConfig`: as ``"auto"``, with its settings.

    Raises:
        ValueError: a setting outside of its range, a complex parameter, a gradient with NaN or infinity (from
            :meth:`step`, before anything was changed; on an accelerator such a step has no effect instead).
        ExchangeError: the service could not be started, or refuses this trainer for good.

    Under several ranks every block has one owner, which alone keeps its statistics and speaks to the service;
    moments are kept by all. :meth:`step` is then collective: all ranks call it equally often, with gradients
    of the same parameters. ``stale_timeout`` should be below the process group's timeout, since the other
    ranks wait for one that waits.
    """

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 3e-3,
        *,
        beta1: float = 0.9,
        momentum: float = 0.0,
        dampening: float = 0.0,
        momentum_of: Literal["grafted", "preconditioned"] = "grafted",
        nesterov: bool = False,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = True,
        maximize: bool = False,
        grafting: GraftingConfig | None = None,
        statistics: StatisticsConfig | None = None,
        blocking: BlockingConfig | None = None,
        root: RootConfig | None = None,
        staleness: StalenessConfig | None = None,
        service: str | ServiceConfig | Exchange | None = None,
        job: str | None = None,
        distributed: str | DistributedConfig = AUTO,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "beta1": beta1,
            "momentum": momentum,
            "dampening": dampening,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
            "grafting": config("grafting", grafting, GraftingConfig()),
            "statistics": config("statistics", statistics, StatisticsConfig()),
            "blocking": config("blocking", blocking, BlockingConfig()),
            "root": config("root", root, RootConfig()),
        }
        if momentum_of != GRAFTED:
            # Groups without the key are as they were before there was another order, checkpoints, too.
            defaults["momentum_of"] = momentum_of
        freshness = config("staleness", staleness, StalenessConfig())
        super().__init__(params, defaults, lambda: Engine(freshness, service, job, distributed))

    def estimate_memory(self, *, replicas: int | None = None, replica: int = 0) -> MemoryEstimate:
        """Peak memory of this optimizer, beside parameters and gradients; what counts is in the result.

        Follows from shapes and settings; no step need have been made, and nothing is allocated. Made on the
        meta device, with ``service=LocalExchange()``, it answers for models that do not fit here.

        Args:
            replicas: as if that many data-parallel ranks held the parameters. None: as it is here.
            replica: the rank in question, with ``replicas``; work is balanced, so ranks differ little.

        Raises:
            ValueError: ``replica`` is none of ``replicas``, or the parameters are ``DTensor``, which bring
                their own mesh.
        """
        self._take_cycled_momentum()
        engine = cast(Engine, self._engine)
        return estimate_memory(
            self.param_groups,
            [GroupSettings.of(group) for group in self.param_groups],
            engine.refresher.config,
            engine.distributed,
            replicas,
            replica,
            engine.credit_bytes,
        )
