"""What ``attach`` leaves in the user's optimizer: hooks, and the state behind them."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from preconditioner_client import checkpoint, checkpoint_check, closures, consolidation
from preconditioner_client.agreement import settings_text
from preconditioner_client.config import Grafting, GraftingConfig
from preconditioner_client.distribution import like, local
from preconditioner_client.engine import Engine
from preconditioner_client.foreach import cast_like, copy_all
from preconditioner_client.gradients import check_parameter, only_initialises, working_gradients
from preconditioner_client.grafting import (
    directions,
    needs_second_moment,
    owns_weight_decay,
    update_second_moments,
)
from preconditioner_client.guard import Guard, is_deferred
from preconditioner_client.memory import MemoryEstimate, estimate_memory
from preconditioner_client.plan import GroupPlan, GroupSettings
from preconditioner_client.update_rule import blank_state

logger = logging.getLogger("preconditioner_client")

STATE_KEY = "preconditioner"
"""Where the attached state stands in the optimizer's own state dict."""


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
        settings: GroupSettings,
        grafting: GraftingConfig,
        names: dict[torch.Tensor, str],
    ) -> None:
        self._optimizer = optimizer
        self._engine = engine
        self._settings = settings
        self._grafting = grafting
        self._names = names
        self._moments: dict[torch.Tensor, dict[str, Any]] = {}
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
        settings = {field.name: getattr(self._settings, field.name) for field in fields(self._settings)}
        own = {
            **_PLAIN,
            **settings,
            "grafting": self._grafting,
            "beta1": 0.0,
            "momentum": 0.0,
            "nesterov": False,
        }
        groups = [{**own, "params": group["params"]} for group in self._optimizer.param_groups]
        return estimate_memory(
            groups,
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
        state = []
        for group, plan in zip(self._optimizer.param_groups, self._engine.plans, strict=True):
            for index, parameter in enumerate(group["params"]):
                moments = self._moments.get(parameter, self._blank_moments(parameter))
                if self._elsewhere_at == self._engine.step:
                    moments = consolidation.without_shards(moments)
                state.append({**moments, **checkpoint.block_states(self._engine, plan, index)})
        return {
            checkpoint.FORMAT_KEY: checkpoint.FORMAT,
            checkpoint.STEP_KEY: self._engine.step,
            checkpoint.EPOCH_KEY: self._engine.epoch,
            checkpoint.SHARDS_KEY: self._engine.ranks.shards,
            "state": state,
        }

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
        checkpoint_check.check_format(state_dict)
        checkpoint_check.check_keys(state_dict, "state")
        saved: list[dict[str, Any]] = state_dict["state"]
        shards = state_dict.get(checkpoint.SHARDS_KEY)
        groups = [group["params"] for group in self._optimizer.param_groups]
        if len(saved) != sum(map(len, groups)):
            raise ValueError(
                f"the checkpoint has the state of {len(saved)} parameters, the optimizer has "
                f"{sum(map(len, groups))}"
            )
        remaining: Iterator[dict[str, Any]] = iter(saved)
        stored = [[next(remaining) for _ in params] for params in groups]
        for plan, params, states in zip(self._engine.plans, groups, stored, strict=True):
            for index, (parameter, state) in enumerate(zip(params, states, strict=True)):
                if self._elsewhere_at == self._engine.step:
                    held = self._moments.get(parameter, {})
                    consolidation.refuse_remains(held, state, self._elsewhere, "a handle attached anew")
                # Without moments nothing but blocks is saved, and a rank without any of them saves nothing.
                checkpoint_check.check_state(
                    state or {"step": 0},
                    {"second_moment": tuple(parameter.shape)},
                    ["second_moment"] if needs_second_moment(self._grafting) else [],
                    f"attach with the grafting that it was saved with, or take {STATE_KEY!r} out of the "
                    f"optimizer's state dict, so that the preconditioner begins anew",
                    plan,
                    index,
                    shards,
                )
        self._consolidated = self._elsewhere_at = None
        self._moments.clear()
        for params, states in zip(groups, stored, strict=True):
            for parameter, state in zip(params, states, strict=True):
                own = {key: value for key, value in state.items() if not key.startswith("block.")}
                if own:
                    self._moments[parameter] = {
                        key: checkpoint.placed(value, parameter, self._engine.ranks)
                        for key, value in own.items()
                    }
        # Where the method counts no steps, 0 does not say that there were none.
        counted = [
            [{key: value for key, value in state.items() if key != "step" or value > 0} for state in states]
            for states in stored
        ]
        checkpoint.restore_blocks(
            self._engine,
            counted,
            int(state_dict[checkpoint.STEP_KEY]),
            int(state_dict[checkpoint.EPOCH_KEY]),
            shards,
        )
        self._restored = True

    def _begin_anew(self) -> None:
        """Forget all that was learned, as if attached just now."""
        self._consolidated = self._elsewhere_at = None
        self._moments.clear()
        blank: list[list[dict[str, Any]]] = [[{} for _ in plan.names] for plan in self._plan()]
        checkpoint.restore_blocks(self._engine, blank, 0, self._engine.epoch)

    def _blank_moments(self, parameter: torch.Tensor) -> dict[str, Any]:
        """What a parameter has before its first update.

        torch.distributed.checkpoint loads the keys that it is shown, and no list in which an entry is empty.
        """
        if not parameter.requires_grad or not needs_second_moment(self._grafting):
            return {"step": 0}
        return blank_state({"grafting": self._grafting, "beta1": 0.0, "momentum": 0.0}, parameter)

    @torch.no_grad()
    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
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
            working_gradients({**_PLAIN, "params": group["params"], "grafting": self._grafting}, plan.names)
            for group, plan in zip(optimizer.param_groups, plans, strict=True)
        ]
        if not any(g is not None for of_group in gradients for g in of_group):
            return
        if only_initialises(optimizer, gradients, self._engine.step, self._engine.ranks.maximum_over_shards):
            return
        self._restored = False
        with self._engine.recorded():
            self._replace(optimizer, plans, gradients, found_inf)

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
            self._diagonal(group, of_group, guard)
            for group, of_group in zip(optimizer.param_groups, gradients, strict=True)
        ]
        for plan, of_group, directions_of in zip(plans, gradients, updates, strict=True):
            self._engine.precondition(plan, of_group, directions_of, self._grafting, usable)
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
        self, group: dict[str, Any], gradients: list[torch.Tensor | None], guard: Guard | None
    ) -> list[torch.Tensor | None]:
        """The direction that blocks without a version pass on, and whose length the others take."""
        present = [i for i, g in enumerate(gradients) if g is not None]
        grads = [g for g in gradients if g is not None]
        if not grads:
            return gradients
        if self._grafting.method in (Grafting.SGD, Grafting.NONE):
            # The gradient is its own direction, and can be overwritten block by block.
            return [g if g is None else g.contiguous() for g in gradients]
        params = [group["params"][i] for i in present]
        states = []
        for parameter, gradient in zip(params, grads, strict=True):
            state = self._moments.setdefault(parameter, {"step": 0})
            state["step"] += 1
            if needs_second_moment(self._grafting) and "second_moment" not in state:
                state["second_moment"] = like(parameter, torch.zeros_like(gradient))
            states.append(state)
        moments = [local(s["second_moment"]) for s in states] if needs_second_moment(self._grafting) else []
        if moments:
            update_second_moments(self._grafting, moments, grads, guard)
        held = [local(p).detach() for p in params] if owns_weight_decay(self._grafting) else []
        weights = cast_like(held, grads[: len(held)])
        steps = [s["step"] for s in states]
        norms = self._engine.ranks.norms
        found = directions(self._grafting, grads, moments, steps, weights, 0.0, norms)
        result: list[torch.Tensor | None] = [None] * len(gradients)
        for position, direction in zip(present, found, strict=True):
            result[position] = direction.contiguous()
        return result

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
            for parameter, name in zip(params, names, strict=True):
                check_parameter(parameter, name)
            self._engine.add_group(
                self._settings, params, names, update=partial(self._update_settings, number)
            )
        return plans

    def _update_settings(self, number: int) -> str:
        """What replicas must have in common beside what blocks follow from: the optimizer and its numbers."""
        optimizer = self._optimizer
        numbers = settings_text(optimizer.param_groups[number], optimizer.defaults)
        return f"{type(optimizer).__name__} {numbers} {self._grafting}"

    def _refuse_copy(self) -> dict[str, Any]:
        raise TypeError(
            f"this {type(self._optimizer).__name__} has a preconditioner attached, which holds a connection: "
            f"copy or save its state_dict() instead, or detach() the preconditioner before"
        )

    def _add_state(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        state_dict[STATE_KEY] = self.state_dict()

    def _take_state(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        saved = state_dict.get(STATE_KEY)
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
