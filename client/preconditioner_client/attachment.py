"""What ``attach`` leaves in the user's optimizer: hooks, and the state behind them."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from preconditioner_client import checkpoint, closures, consolidation
from preconditioner_client.agreement import settings_text
from preconditioner_client.attached_groups import AttachedGroups
from preconditioner_client.attached_state import STATE_KEY, AttachedState
from preconditioner_client.distribution import local
from preconditioner_client.engine import Engine
from preconditioner_client.foreach import copy_all
from preconditioner_client.gradients import (
    check_parameter,
    held_gradients,
    only_initialises,
    refuse_capture,
    working_gradients,
)
from preconditioner_client.guard import Guard, is_deferred
from preconditioner_client.memory import MemoryEstimate, estimate_memory
from preconditioner_client.plan import GroupPlan

logger = logging.getLogger("preconditioner_client")


class Attachment:
    """What :func:`attach` returns.

    The optimizer's state dict carries its state under ``"preconditioner"``. ``get_optimizer_state_dict`` of
    ``torch.distributed.checkpoint`` keeps only what torch itself knows: this object is a ``Stateful``, to be
    saved and loaded beside it.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        engine: Engine,
        settings: AttachedGroups,
        names: dict[torch.Tensor, str],
    ) -> None:
        self._optimizer = optimizer
        self._engine = engine
        self._settings = settings
        self._state = AttachedState(engine, settings)
        self._names = names
        self._consolidated: dict[str, Any] | None = None
        self._elsewhere_at: int | None = None
        """Step at which another rank got the whole."""
        self._elsewhere = 0
        """That rank."""
        self._restored = False
        """Whether the handle itself was loaded into since the last step."""
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_state_dict_post_hook(self._add_state),
            optimizer.register_load_state_dict_pre_hook(self._take_state),
        ]
        # Neither is an attribute that torch declares. Copying and pickling ask the instance first.
        vars(optimizer).update(_attached_preconditioner=self, __getstate__=self._refuse_copy)

    def metrics(self) -> dict[str, Any]:
        """As ``Shampoo.metrics``."""
        return self._engine.metrics()

    def estimate_memory(self, *, replicas: int | None = None, replica: int = 0) -> MemoryEstimate:
        """As ``Shampoo.estimate_memory``; what the optimizer itself keeps comes on top."""
        own = {**_PLAIN, "beta1": 0.0, "momentum": 0.0, "nesterov": False}
        settings = [self._settings[number] for number in range(len(self._optimizer.param_groups))]
        groups = [
            {**own, "grafting": of_group.grafting, "params": group["params"]}
            for group, of_group in zip(self._optimizer.param_groups, settings, strict=True)
        ]
        return estimate_memory(
            groups,
            [of_group.blocks for of_group in settings],
            self._engine.refresher.config,
            self._engine.distributed,
            replicas,
            replica,
            self._engine.credit_bytes,
        )

    def detach(self) -> None:
        """Take the hooks out and end the exchange; the optimizer is as it was before. Idempotent."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if getattr(self._optimizer, "_attached_preconditioner", None) is self:
            del vars(self._optimizer)["_attached_preconditioner"], vars(self._optimizer)["__getstate__"]
        self._engine.close()

    def close(self) -> None:
        """The same as :meth:`detach`."""
        self.detach()

    def state_dict(self) -> dict[str, Any]:
        """Statistics, versions and moments, free of anything but tensors and numbers.

        ``state``: one dict per parameter in the optimizer's order, with the keys of
        :mod:`preconditioner_client.checkpoint`; beside it the format, step, epoch and shards. Under several
        ranks the blocks of this rank; after :meth:`consolidate_state_dict`, and until the next step, all on
        the rank that was named, and no sharded tensors on the others.
        """
        self._plan()
        if self._consolidated is not None and self._consolidated[checkpoint.STEP_KEY] == self._engine.step:
            return self._consolidated
        return self._state.exported(self._parameters(), shards=self._elsewhere_at != self._engine.step)

    def consolidate_state_dict(self, to: int = 0) -> None:
        """Collect the state of all ranks, as ``Shampoo.consolidate_state_dict``.

        What the user's optimizer keeps is not touched.
        """
        self._consolidated = self._elsewhere_at = None
        own = self.state_dict()
        numbers = iter(range(len(own["state"])))
        groups = [{"params": [next(numbers) for _ in plan.names]} for plan in self._engine.plans]
        numbered = {"state": dict(enumerate(own["state"])), "param_groups": groups}
        whole = consolidation.collect(self._engine, numbered, to)
        if whole is not None:
            self._consolidated = {**own, "state": [whole["state"][i] for i in range(len(own["state"]))]}
        else:
            self._elsewhere_at, self._elsewhere = self._engine.step, to

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`, in a new epoch.

        The optimizer's own ``load_state_dict`` may come before or after it.

        Raises:
            ValueError: it does not fit the optimizer's parameters; names the first that differs. Or it is
                what a rank that was not named gave after :meth:`consolidate_state_dict`.
        """
        self._plan()
        elsewhere = self._elsewhere if self._elsewhere_at == self._engine.step else None
        self._state.load(self._parameters(), state_dict, elsewhere)
        self._consolidated = self._elsewhere_at = None
        self._restored = True

    def _begin_anew(self) -> None:
        """Forget all that was learned, as if attached just now."""
        self._plan()
        self._consolidated = self._elsewhere_at = None
        self._state.begin_anew()

    def _parameters(self) -> list[list[torch.Tensor]]:
        return [group["params"] for group in self._optimizer.param_groups]

    @_disable_dynamo  # as Shampoo's step
    @torch.no_grad()
    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        refuse_capture(optimizer.param_groups)
        # torch passes the optimizer itself as the first of args.
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._precondition(optimizer)
            return None
        closures.refuse_under_grad_scaler()
        stand_in = closures.evaluated(closure)
        self._precondition(optimizer)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": stand_in}
        return (args[0], stand_in, *args[2:]), kwargs

    def _precondition(self, optimizer: Optimizer) -> None:
        if getattr(optimizer, "grad_scale", None) is not None:
            raise RuntimeError(
                "the gradients are still scaled: call scaler.unscale_(optimizer) before "
                "scaler.step(optimizer), or make the optimizer without fused=True"
            )
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and not is_deferred(found_inf.device) and bool(found_inf):
            return
        plans = self._plan()
        gradients = [
            self._gradients(number, group["params"], plan)
            for number, (group, plan) in enumerate(zip(optimizer.param_groups, plans, strict=True))
        ]
        if not any(g is not None for of_group in gradients for g in of_group):
            return
        if only_initialises(optimizer, gradients, self._engine.step, self._engine.ranks.maximum_over_shards):
            return
        self._restored = False
        with self._engine.recorded():
            self._replace(optimizer, plans, gradients, found_inf)

    def _gradients(
        self, number: int, parameters: Sequence[torch.Tensor], plan: GroupPlan
    ) -> list[torch.Tensor | None]:
        """What is preconditioned; of a group that is left alone what may make the whole step a bad one."""
        settings = self._settings[number]
        if settings.left_alone:
            return held_gradients(parameters)
        return working_gradients({**_PLAIN, "params": parameters, "grafting": settings.grafting}, plan.names)

    def _replace(
        self,
        optimizer: Optimizer,
        plans: Sequence[GroupPlan],
        gradients: Sequence[list[torch.Tensor | None]],
        found_inf: torch.Tensor | None,
    ) -> None:
        """Put the preconditioned directions where the gradients are."""
        guard = self._engine.examine(gradients, found_inf)
        usable = self._engine.advance(gradients, guard)
        updates = [
            self._diagonal(number, group["params"], of_group, guard)
            for number, (group, of_group) in enumerate(zip(optimizer.param_groups, gradients, strict=True))
        ]
        for number, (plan, of_group) in enumerate(zip(plans, gradients, strict=True)):
            grafting = self._settings[number].grafting
            self._engine.precondition(plan, of_group, updates[number], grafting, usable)
        self._engine.share(updates)
        if guard is not None:
            guard.clear_([update for of_group in updates for update in of_group if update is not None])
        replaced = [
            (held, update)
            for group, directions_of in zip(optimizer.param_groups, updates, strict=True)
            for parameter, update in zip(group["params"], directions_of, strict=True)
            if update is not None and update is not (held := local(parameter.grad))
        ]
        copy_all([held for held, _ in replaced], [update for _, update in replaced])

    def _diagonal(
        self,
        number: int,
        parameters: Sequence[torch.Tensor],
        gradients: list[torch.Tensor | None],
        guard: Guard | None,
    ) -> list[torch.Tensor | None]:
        """What takes the place of a group's gradients where no block has a version; None: they stay."""
        settings = self._settings[number]
        if settings.left_alone:
            return [None] * len(gradients)
        moments = self._state.moments
        return moments.directions(settings.grafting, parameters, gradients, self._engine.ranks, guard)

    def _plan(self) -> list[Any]:
        """Plans of all groups; those added meanwhile join."""
        known = [name for plan in self._engine.plans for name in plan.names]
        planned = [group["params"] for group in self._optimizer.param_groups[: len(self._engine.plans)]]
        if self._engine.forget_moved(planned):
            self._names.update(zip(itertools.chain(*planned), known, strict=False))
        plans = self._engine.plans
        for number in range(len(plans), len(self._optimizer.param_groups)):
            params = self._optimizer.param_groups[number]["params"]
            names = [self._names.get(p, f"group{number}.parameter{i}") for i, p in enumerate(params)]
            settings = self._settings[number]
            for parameter, name in zip(params, names, strict=True):
                if not settings.left_alone:
                    check_parameter(parameter, name)
            self._engine.add_group(
                settings.blocks, params, names, update=partial(self._update_settings, number)
            )
        return plans

    def _update_settings(self, number: int) -> str:
        """What replicas must have in common beside what blocks follow from: the optimizer and its numbers."""
        optimizer = self._optimizer
        numbers = settings_text(optimizer.param_groups[number], optimizer.defaults)
        settings = self._settings[number]
        grafting = "" if settings.left_alone else f" {settings.grafting}"
        return f"{type(optimizer).__name__} {numbers}{grafting}"

    def _refuse_copy(self) -> dict[str, Any]:
        raise TypeError(
            f"this {type(self._optimizer).__name__} has a preconditioner attached, which holds a connection: "
            f"copy or save its state_dict() instead, or detach() the preconditioner before"
        )

    def _add_state(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        state_dict[STATE_KEY] = self.state_dict()

    def _take_state(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        saved = state_dict.get(STATE_KEY)
        if any(checkpoint.FORMAT_KEY in group for group in state_dict.get("param_groups", ())):
            raise ValueError(
                f"the state dict is that of an optimizer which preconditions by itself, as Shampoo, and "
                f"lacks what {type(optimizer).__name__} reads in a step: load it into one like that which "
                f"saved it, or begin with the weights alone"
            )
        if saved is not None:
            self.load_state_dict(saved)
            self._restored = False
        elif not self._restored:
            begun = self._engine.step > 0
            if begun:
                self._begin_anew()
            if begun or state_dict.get("state"):
                logger.warning(
                    "the state dict that is loaded into %s has no %r: the preconditioner attached to it "
                    "begins anew, as it should with the checkpoint of a plain optimizer. "
                    "get_optimizer_state_dict of torch.distributed.checkpoint leaves it out: save what "
                    "attach() returned beside it, as in dcp.save({..., 'preconditioner': handle}), or the "
                    "handle.state_dict() for handle.load_state_dict()",
                    type(optimizer).__name__,
                    STATE_KEY,
                )


# The user's optimizer sees to sign and weight decay by itself.
_PLAIN: dict[str, Any] = {"maximize": False, "weight_decay": 0.0, "decoupled_weight_decay": True}
