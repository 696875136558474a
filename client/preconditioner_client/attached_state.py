"""The state of what is attached to somebody else's optimizer, as that one's state dict carries it, and back.

``state`` is a list with one dict per parameter in the optimizer's order, with the keys of
:mod:`preconditioner_client.checkpoint`; beside it stand the format, step, epoch and shards. A parameter of a
group that is left alone has nothing but a ``step`` of -1.
"""

from __future__ import annotations

import logging
import numbers
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from preconditioner_client import checkpoint, checkpoint_check, consolidation
from preconditioner_client.attached_groups import AttachedGroups
from preconditioner_client.attached_moments import AttachedMoments
from preconditioner_client.engine import Engine
from preconditioner_client.grafting import needs_second_moment

logger = logging.getLogger("preconditioner_client")

STATE_KEY = "preconditioner"
"""Where the attached state stands in the optimizer's own state dict."""

LEFT_ALONE = -1
"""In the place of a parameter's number of updates."""

Parameters = Sequence[Sequence[torch.Tensor]]
"""Of each group, as many groups as the engine has plans."""

States = list[list[dict[str, Any]]]
"""For each group, for each of its parameters."""


class AttachedState:
    """Moments and blocks together.

    Args:
        engine: that keeps the blocks; its groups are all planned whenever something is asked here.
        settings: of the groups.

    Attributes:
        moments: of the diagonal methods.
    """

    def __init__(self, engine: Engine, settings: AttachedGroups) -> None:
        self._engine = engine
        self._settings = settings
        self.moments = AttachedMoments()

    def exported(self, parameters: Parameters, shards: bool = True) -> dict[str, Any]:
        """The state dict of this rank; sharded tensors only with ``shards``."""
        state: list[dict[str, Any]] = []
        for number, (params, plan) in enumerate(zip(parameters, self._engine.plans, strict=True)):
            settings = self._settings[number]
            if settings.left_alone:
                state.extend({"step": LEFT_ALONE} for _ in params)
                continue
            for index, parameter in enumerate(params):
                moments = self.moments.state(parameter, settings.grafting)
                if not shards:
                    moments = consolidation.without_shards(moments)
                state.append({**moments, **checkpoint.block_states(self._engine, plan, index)})
        return {
            checkpoint.FORMAT_KEY: checkpoint.FORMAT,
            checkpoint.STEP_KEY: self._engine.step,
            checkpoint.EPOCH_KEY: self._engine.epoch,
            checkpoint.SHARDS_KEY: self._engine.ranks.shards,
            "state": state,
        }

    def load(self, parameters: Parameters, state_dict: dict[str, Any], elsewhere: int | None = None) -> None:
        """Continue from such a state dict, in a new epoch.

        A group that is left alone, or was when it was saved, takes nothing from it; a warning says so.

        Args:
            parameters: of the optimizer.
            state_dict: see the module.
            elsewhere: the rank that alone shows shards since a consolidation; None without one.

        Raises:
            ValueError: it does not fit the parameters; names the first that differs. Nothing is changed then.
        """
        stored = self._checked(parameters, state_dict, elsewhere)
        self.moments.clear()
        for params, states in zip(parameters, stored, strict=True):
            for parameter, state in zip(params, states, strict=True):
                if not _is_left_alone(state):
                    self.moments.restore(parameter, state, self._engine.ranks)
        # Where the method counts no steps, 0 does not say that there were none.
        counted = [
            [{key: value for key, value in state.items() if key != "step" or value != 0} for state in states]
            for states in stored
        ]
        checkpoint.restore_blocks(
            self._engine,
            counted,
            int(state_dict[checkpoint.STEP_KEY]),
            int(state_dict[checkpoint.EPOCH_KEY]),
            state_dict.get(checkpoint.SHARDS_KEY),
        )

    def begin_anew(self) -> None:
        """Forget all that was learned, as if attached just now."""
        self.moments.clear()
        blank: States = [[{} for _ in plan.names] for plan in self._engine.plans]
        checkpoint.restore_blocks(self._engine, blank, 0, self._engine.epoch)

    def _checked(self, parameters: Parameters, state_dict: dict[str, Any], elsewhere: int | None) -> States:
        """What is to be restored, held against the plans."""
        checkpoint_check.check_format(state_dict)
        checkpoint_check.check_keys(state_dict, "state")
        saved: list[dict[str, Any]] = state_dict["state"]
        if len(saved) != sum(map(len, parameters)):
            raise ValueError(
                f"the checkpoint has the state of {len(saved)} parameters, the optimizer has "
                f"{sum(map(len, parameters))}"
            )
        remaining: Iterator[dict[str, Any]] = iter(saved)
        stored = [[next(remaining) for _ in params] for params in parameters]
        differing = [
            (number, states)
            for number, states in enumerate(stored)
            if any(_is_left_alone(state) != self._settings[number].left_alone for state in states)
        ]
        for number, states in differing:
            stored[number] = [
                {"step": LEFT_ALONE} if self._settings[number].left_alone or _is_left_alone(state) else state
                for state in states
            ]
        for number, (params, states) in enumerate(zip(parameters, stored, strict=True)):
            for index, (parameter, state) in enumerate(zip(params, states, strict=True)):
                if not _is_left_alone(state):
                    if elsewhere is not None:
                        held = self.moments.held(parameter)
                        consolidation.refuse_remains(held, state, elsewhere, "a handle attached anew")
                    self._check(number, index, parameter, state, state_dict.get(checkpoint.SHARDS_KEY))
        if state_dict[checkpoint.STEP_KEY] > 0:
            self._warn([number for number, _ in differing])
        return stored

    def _check(
        self, number: int, index: int, parameter: torch.Tensor, state: dict[str, Any], shards: int | None
    ) -> None:
        """Hold the state of one parameter of a group against its plan."""
        checkpoint_check.check_state(
            # Without moments nothing but blocks is saved, and a rank without any of them saves nothing.
            state or {"step": 0},
            {"second_moment": tuple(parameter.shape)},
            ["second_moment"] if needs_second_moment(self._settings[number].grafting) else [],
            f"attach with the grafting that it was saved with, or take {STATE_KEY!r} out of the "
            f"optimizer's state dict, so that the preconditioner begins anew",
            self._engine.plans[number],
            index,
            shards,
        )

    def _warn(self, differing: Sequence[int]) -> None:
        """Say which groups take nothing from a checkpoint, and why."""
        for number in differing:
            if self._settings[number].left_alone:
                logger.warning(
                    "parameter group %d is left alone, and was not when the checkpoint was saved: what that "
                    "has of the group's statistics is dropped",
                    number,
                )
            else:
                logger.warning(
                    "parameter group %d was left alone when the checkpoint was saved, and is not now: its "
                    "preconditioner begins anew, while the other groups go on",
                    number,
                )


def _is_left_alone(state: dict[str, Any]) -> bool:
    step = state.get("step")
    single = isinstance(step, numbers.Real) or (torch.is_tensor(step) and step.numel() == 1)
    return single and bool(step == LEFT_ALONE)
