"""What the optimizers here share as ``torch.optim.Optimizer``: the step around an engine, and its state."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, cast, overload

import torch
import torch.distributed as dist
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from preconditioner_client import checkpoint, checkpoint_check, closures, consolidation
from preconditioner_client.agreement import settings_text
from preconditioner_client.averaging import averages_first, check_kept_order
from preconditioner_client.engine import Engine
from preconditioner_client.gradients import only_initialises, refuse_capture, working_gradients
from preconditioner_client.groups import check_group
from preconditioner_client.plan import GroupSettings, check_kept_settings
from preconditioner_client.update_rule import apply_updates, directions_of, states_of

logger = logging.getLogger("preconditioner_client")


class PreconditionedOptimizer(Optimizer):
    """An optimizer whose blocks are preconditioned by an :class:`Engine`; see its subclasses.

    Args:
        params: as for every torch optimizer.
        defaults: of the groups; all keys that :func:`check_group` knows but the learning rate's scale.
        make_engine: called when the groups have passed, so that nothing is dialled for settings that are
            refused.
    """

    def __init__(self, params: Any, defaults: dict[str, Any], make_engine: Callable[[], Engine]) -> None:
        self._engine: Engine | None = None
        self._heavy_balls: list[bool] = []
        self._consolidated: dict[str, Any] | None = None
        self._consolidated_at = 0
        self._elsewhere: int | None = None
        """Another rank, which has the whole."""
        self._warned = self._warned_of_rank_0 = False
        super().__init__(params, defaults)
        self._engine = make_engine()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, also in the middle of training; its blocks join the session with the next step."""
        super().add_param_group(param_group)
        try:
            check_group(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise
        # A copy of a group whose momentum a scheduler cycles has none of its own, if none was asked for.
        cycled = "max_momentum" in param_group and self.defaults["momentum"] == 0
        group = self.param_groups[-1]
        self._heavy_balls.append(averages_first(group) or (group["momentum"] > 0 and not cycled))

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    # As parts of torch's own optimizers are: within a compiled function it runs as it is. The public
    # torch.compiler.disable would import the compiler together with this package.
    @_disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of all parameters that have a gradient.

        Does no I/O with the service, and waits only as ``staleness`` says, and for other ranks.

        Raises:
            ValueError: a gradient holds NaN or infinity, on any rank. Nothing has changed then. (On an
                accelerator, where the host would have to wait to know, there is no error: such a step changes
                neither statistics nor moments nor weights, may set gradients to zero, and is logged and
                counted as soon as the host hears of it.) Or ``momentum_of`` was changed in a live group, or
                ranks do not train the same.
            RuntimeError: a gradient is sparse, replicas have gradients of different parameters, a closure
                goes through a ``GradScaler``, or a CUDA graph is being captured.
            ExchangeError: the service refused this trainer for good when it first answered.
        """
        refuse_capture(self.param_groups)
        loss = None
        if closure is not None:
            closures.refuse_under_grad_scaler()
            with torch.enable_grad():
                loss = closure()
        self._take_cycled_momentum()
        engine = self._planned()
        for number, (group, plan) in enumerate(zip(self.param_groups, engine.plans, strict=True)):
            check_kept_order(group, plan.settings.momentum_of, number)
            check_kept_settings(group, plan.settings, number)
        self._consolidated = self._elsewhere = None
        gradients = [
            working_gradients(group, plan.names)
            for group, plan in zip(self.param_groups, engine.plans, strict=True)
        ]
        if not any(g is not None for of_group in gradients for g in of_group):
            return loss
        if only_initialises(self, gradients, engine.step, engine.ranks.maximum_over_shards):
            for group, of_group in zip(self.param_groups, gradients, strict=True):
                states_of(self.state, group, of_group, momentum_too=group["momentum"] > 0)
            checkpoint.write(self, engine)
            return loss
        with engine.recorded():
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

    def close(self) -> None:
        """End the exchange, and an embedded service with it. Happens by itself when the process ends."""
        if self._engine is not None:
            self._engine.close()

    def state_dict(self) -> dict[str, Any]:
        """State in torch's layout; keys are documented in :mod:`preconditioner_client.checkpoint`.

        Not collective: among several ranks it holds the blocks of this rank, as
        ``torch.distributed.checkpoint`` wants it. After :meth:`consolidate_state_dict`, and until the next
        step, it is the whole state on the rank that was named, and without sharded tensors on the others.
        """
        if self._consolidated is not None:
            return _copied(self._consolidated)
        self._take_cycled_momentum()
        engine = self._planned()
        # Before the first step there is nothing to lose, and after a consolidation all ranks have taken part
        # in it. Accelerate asks every rank then, and writes what one of them has.
        known = engine.step in (0, self._consolidated_at)
        if engine.ranks.replicas > 1 and not known and not self._warned:
            self._warned = True
            logger.warning(
                "state_dict() of rank %d of %d holds the blocks of that rank alone: to save the state in one "
                "file, call consolidate_state_dict() on all ranks before it. torch.distributed.checkpoint "
                "saves the parts of all ranks by itself, but in a full state dict (full_state_dict=True), "
                "which needs that call, too",
                engine.ranks.rank,
                engine.ranks.world_size,
            )
        checkpoint.write(self, engine)
        exported = checkpoint.exported(engine, super().state_dict())
        if self._elsewhere is not None:
            self._warn_of_rank_0(self._elsewhere)
            states = exported["state"].items()
            exported["state"] = {index: consolidation.without_shards(state) for index, state in states}
        return exported

    def consolidate_state_dict(self, to: int = 0) -> None:
        """Collect the state of all ranks, so that :meth:`state_dict` of one of them is complete.

        Collective: all ranks call it after the same step. Such a checkpoint loads on any number of ranks,
        replicas or shards. Tensors from other ranks come to the host, block by block. It is called like that
        of ``ZeroRedundancyOptimizer``. ``get_optimizer_state_dict`` of ``torch.distributed.checkpoint`` gives
        the whole, too, until the next step; to be saved, not to be loaded into.

        Args:
            to: global rank that gets it. 0 for a full state dict of torch (``full_state_dict=True``), which
                is that of rank 0.

        Raises:
            ValueError: no rank of that number trains these parameters.
        """
        self._take_cycled_momentum()
        engine = self._planned()
        checkpoint.write(self, engine)
        own = checkpoint.exported(engine, super().state_dict(), blocks=consolidation.receives(engine, to))
        self._consolidated = consolidation.collect(engine, own, to)
        self._consolidated_at = engine.step
        self._elsewhere = to if self._consolidated is None else None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint, in a new epoch: what an earlier life had under way is not adopted.

        Raises:
            ValueError: the checkpoint does not fit these parameters; names the first that differs. Or it was
                loaded into what this rank gave after :meth:`consolidate_state_dict`.
        """
        engine = self._planned()
        if self._elsewhere is not None:
            self._refuse_remains(state_dict, self._elsewhere)
        checkpoint_check.check(self, engine, state_dict)
        self._consolidated = self._elsewhere = None
        super().load_state_dict(checkpoint.with_settings(self, state_dict))
        # One that a scheduler had at 0 is none the less.
        self._heavy_balls = [
            heavy or group["momentum"] > 0
            for heavy, group in zip(self._heavy_balls, self.param_groups, strict=True)
        ]
        checkpoint.read(self, engine, state_dict)

    def _refuse_remains(self, state_dict: dict[str, Any], rank: int) -> None:
        """Refuse what was loaded into the state dict of this rank while another had the whole."""
        for group, saved in zip(self.param_groups, state_dict.get("param_groups", ()), strict=False):
            for parameter, identity in zip(group["params"], saved.get("params", ()), strict=False):
                state = state_dict.get("state", {}).get(identity, {})
                held = self.state.get(parameter, {})
                consolidation.refuse_remains(held, state, rank, "an optimizer made anew")

    def _warn_of_rank_0(self, rank: int) -> None:
        """What rank 0 shows is what torch and most frameworks save, and it is not known here who asks."""
        if dist.get_rank() == 0 and not self._warned_of_rank_0:
            self._warned_of_rank_0 = True
            logger.warning(
                "state_dict() of rank 0 is a part: consolidate_state_dict(to=%d) gave the whole to rank %d. "
                "A full state dict of torch.distributed.checkpoint (full_state_dict=True) takes that of rank "
                "0, and loses sharded tensors and the other ranks' blocks: for one, call "
                "consolidate_state_dict(to=0) on all ranks",
                rank,
                rank,
            )

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            f"a {type(self).__name__} optimizer holds a connection; copy or save its state_dict() instead"
        )

    def own_state_shapes(self, parameter: torch.Tensor) -> dict[str, tuple[int, ...]]:
        """Tensors that the state of a parameter may have beside moments and blocks, with their shapes."""
        return {}

    def _take_cycled_momentum(self) -> None:
        """Take as beta1 what a scheduler cycles in a group without a heavy ball.

        OneCycleLR and CyclicLR cycle ``betas[0]`` where an optimizer has it, else ``momentum``, which here
        would be a second average on top of the first.
        """
        # Groups that were put into the list by hand are taken as they are.
        for group, heavy_ball in zip(self.param_groups, self._heavy_balls, strict=False):
            if "max_momentum" in group and not heavy_ball and group["momentum"] > 0 < group["beta1"]:
                group["beta1"], group["momentum"] = group["momentum"], 0.0

    def _planned(self) -> Engine:
        """The engine with a plan of every group; made late, since modules move to their device until then."""
        engine = cast(Engine, self._engine)
        if engine.forget_moved([group["params"] for group in self.param_groups[: len(engine.plans)]]):
            self.state.clear()
        for number in range(len(engine.plans), len(self.param_groups)):
            group = self.param_groups[number]
            names = [str(name) for name in group.get("param_names", ())]
            engine.add_group(
                GroupSettings.of(group),
                group["params"],
                names or [f"group{number}.parameter{i}" for i in range(len(group["params"]))],
                update=partial(_update_settings, group, self.defaults),
            )
        return engine


def _copied(state_dict: dict[str, Any]) -> dict[str, Any]:
    """With the same values in dicts of its own, as torch's functions rename keys within a state dict."""
    states = {index: dict(state) for index, state in state_dict["state"].items()}
    groups = [dict(group) for group in state_dict["param_groups"]]
    return {**state_dict, "state": states, "param_groups": groups}


def _update_settings(group: dict[str, Any], defaults: dict[str, Any]) -> str:
    """What replicas must have in common beside what blocks follow from."""
    # Frameworks add defaults that groups lack.
    return settings_text(group, [key for key in defaults if key not in {"blocking", "statistics", "root"}])
