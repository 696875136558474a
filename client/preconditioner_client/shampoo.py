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

import logging
from collections.abc import Callable
from typing import Any, cast, overload

import torch
from torch.optim import Optimizer

from preconditioner_client import checkpoint, closures, consolidation
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
from preconditioner_client.gradients import only_initialises, working_gradients
from preconditioner_client.groups import check_group
from preconditioner_client.memory import MemoryEstimate, estimate_memory, ranks_as_if
from preconditioner_client.plan import GroupSettings
from preconditioner_client.service_config import ServiceConfig
from preconditioner_client.update_rule import apply_updates, directions_of, states_of

logger = logging.getLogger("preconditioner_client")


class Shampoo(Optimizer):
    """Shampoo with grafting, preconditioned asynchronously.

    Args:
        params: parameters, named parameters or groups, as for every torch optimizer. All keyword arguments
            but ``staleness``, ``service`` and ``job`` may differ between groups.
        lr: learning rate > 0; a float or a tensor.
        beta1: decay of the gradient's EMA, bias-corrected; 0 turns it off.
        momentum: heavy-ball factor over the preconditioned updates, as in ``torch.optim.SGD``.
        dampening: of the momentum.
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
        self._engine: Engine | None = None
        self._consolidated: dict[str, Any] | None = None
        self._warned = False
        defaults = {
            "lr": lr,
            "beta1": beta1,
            "momentum": momentum,
            "dampening": dampening,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
            "grafting": grafting or GraftingConfig(),
            "statistics": statistics or StatisticsConfig(),
            "blocking": blocking or BlockingConfig(),
            "root": root or RootConfig(),
        }
        super().__init__(params, defaults)
        # Last, so that nothing is dialled for settings that are refused.
        self._engine = Engine(staleness or StalenessConfig(), service, job, distributed)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, also in the middle of training; its blocks join the session with the next step."""
        super().add_param_group(param_group)
        try:
            check_group(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of all parameters that have a gradient.

        Does no I/O with the service, and waits only as ``staleness`` says, and for other ranks.

        Raises:
            ValueError: a gradient holds NaN or infinity, on any rank. Nothing has changed then. (On an
                accelerator, where the host would have to wait to know, there is no error: such a step changes
                neither statistics nor moments nor weights, may set gradients to zero, and is logged and
                counted as soon as the host hears of it.) Or ranks do not train the same.
            RuntimeError: a gradient is sparse, replicas have gradients of different parameters, or a closure
                goes through a ``GradScaler``.
            ExchangeError: the service refused this trainer for good when it first answered.
        """
        loss = None
        if closure is not None:
            closures.refuse_under_grad_scaler()
            with torch.enable_grad():
                loss = closure()
        engine = self._planned()
        self._consolidated = None
        gradients = [
            working_gradients(group, plan.names)
            for group, plan in zip(self.param_groups, engine.plans, strict=True)
        ]
        if not any(g is not None for of_group in gradients for g in of_group):
            return loss
        if only_initialises(self, gradients):
            for group, of_group in zip(self.param_groups, gradients, strict=True):
                states_of(self.state, group, of_group, momentum_too=group["momentum"] > 0)
            checkpoint.write(self, engine)
            return loss
        guard = engine.examine(gradients)
        usable = engine.advance(gradients, guard)
        updates = [
            directions_of(engine, self.state, group, plan, of_group, usable, guard)
            for group, plan, of_group in zip(self.param_groups, engine.plans, gradients, strict=True)
        ]
        engine.share(updates)
        for group, of_group in zip(self.param_groups, updates, strict=True):
            apply_updates(self.state, group, of_group, guard)
        return loss

    def metrics(self) -> dict[str, Any]:
        """Counters as a plain dict of numbers and lists.

        ``step``, ``epoch``; ``blocks``, ``blocks_with_version``; ``age`` (largest now, None without
        versions), ``age_max`` (largest ever used), ``ages`` (steps from snapshot to adoption of the latest
        refreshes); ``versions_adopted``, ``outdated`` and ``refused`` (NACKs); ``waits``, ``wait_seconds``,
        ``wait_timeouts``, ``breaker_open``; ``blocks_grafted_stale`` and ``blocks_kept_stale`` (blocks x
        steps beyond the bound); ``late_adoptions`` (after their scheduled step); ``nonfinite_steps`` (on an
        accelerator, known to have had no effect since a gradient was not finite); and the exchange's
        counters, see :meth:`Exchange.counters`. Among several ranks all of it is about this rank's blocks.
        """
        return cast(Engine, self._engine).metrics()

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
        engine = cast(Engine, self._engine)
        ranks = ranks_as_if(
            engine.distributed, [p for group in self.param_groups for p in group["params"]], replicas, replica
        )
        return estimate_memory(self.param_groups, engine.refresher.config, ranks)

    def close(self) -> None:
        """End the exchange, and an embedded service with it. Happens by itself when the process ends."""
        if self._engine is not None:
            self._engine.close()

    def state_dict(self) -> dict[str, Any]:
        """State in torch's layout; keys are documented in :mod:`preconditioner_client.checkpoint`.

        Not collective: among several ranks it holds the blocks of this rank, as
        ``torch.distributed.checkpoint`` wants it. After :meth:`consolidate_state_dict`, and until the next
        step, it is the whole state on the rank that was named.
        """
        if self._consolidated is not None:
            return self._consolidated
        engine = self._planned()
        # Before the first step there is nothing to lose; Accelerate asks for it then.
        if engine.ranks.replicas > 1 and engine.step > 0 and not self._warned:
            self._warned = True
            logger.warning(
                "state_dict() of rank %d of %d holds the blocks of that rank alone: to save the state in one "
                "file, call consolidate_state_dict() on all ranks before it. torch.distributed.checkpoint "
                "saves the parts of all ranks by itself",
                engine.ranks.rank,
                engine.ranks.world_size,
            )
        checkpoint.write(self, engine)
        return checkpoint.exported(engine, super().state_dict())

    def consolidate_state_dict(self, to: int = 0) -> None:
        """Collect the state of all ranks, so that :meth:`state_dict` of one of them is complete.

        Collective: all ranks call it after the same step. Such a checkpoint loads on any number of ranks,
        replicas or shards. Tensors from other ranks come to the host, block by block. It is called like that
        of ``ZeroRedundancyOptimizer``.

        Args:
            to: global rank that gets it.
        """
        engine = self._planned()
        checkpoint.write(self, engine)
        own = checkpoint.exported(engine, super().state_dict())
        self._consolidated = consolidation.collect(engine, own, to)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint, in a new epoch: what an earlier life had under way is not adopted.

        Raises:
            ValueError: the checkpoint does not fit these parameters; names the first that differs.
        """
        engine = self._planned()
        checkpoint.check(self, engine, state_dict)
        self._consolidated = None
        super().load_state_dict(checkpoint.with_settings(self, state_dict))
        checkpoint.read(self, engine, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a Shampoo optimizer holds a connection; copy or save its state_dict() instead")

    def _planned(self) -> Engine:
        """The engine with a plan of every group; made late, since modules move to their device until then."""
        engine = cast(Engine, self._engine)
        if engine.forget_moved([group["params"] for group in self.param_groups[: len(engine.plans)]]):
            self.state.clear()
        for number in range(len(engine.plans), len(self.param_groups)):
            group = self.param_groups[number]
            names = [str(name) for name in group.get("param_names", ())]
            settings = GroupSettings(
                blocking=group["blocking"], statistics=group["statistics"], root=group["root"]
            )
            engine.add_group(
                settings,
                group["params"],
                names or [f"group{number}.parameter{i}" for i in range(len(group["params"]))],
            )
        return engine
