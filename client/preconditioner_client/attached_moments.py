"""Second moments of what is attached to somebody else's optimizer, and the directions that they give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from preconditioner_client.checkpoint import own_state
from preconditioner_client.config import Grafting, GraftingConfig
from preconditioner_client.distribution import Ranks, like, local
from preconditioner_client.foreach import cast_like
from preconditioner_client.grafting import (
    directions,
    needs_second_moment,
    owns_weight_decay,
    update_second_moments,
)
from preconditioner_client.guard import Guard
from preconditioner_client.update_rule import blank_state


class AttachedMoments:
    """What the diagonal methods keep of each parameter, in the forms of a state dict."""

    def __init__(self) -> None:
        self._states: dict[torch.Tensor, dict[str, Any]] = {}

    def clear(self) -> None:
        """Forget all."""
        self._states.clear()

    def state(self, parameter: torch.Tensor, grafting: GraftingConfig) -> dict[str, Any]:
        """Of one parameter, also before its first update.

        torch.distributed.checkpoint loads the keys that it is shown, and no list in which an entry is empty.
        """
        if parameter in self._states:
            return self._states[parameter]
        if not parameter.requires_grad or not needs_second_moment(grafting):
            return {"step": 0}
        return blank_state({"grafting": grafting, "beta1": 0.0, "momentum": 0.0}, parameter)

    def held(self, parameter: torch.Tensor) -> Mapping[str, Any]:
        """What is kept of one parameter; empty before its first update."""
        return self._states.get(parameter, {})

    def restore(self, parameter: torch.Tensor, saved: dict[str, Any], ranks: Ranks) -> None:
        """Take what a checkpoint has of one parameter beside its blocks."""
        own = own_state(saved, parameter, ranks)
        if own:
            self._states[parameter] = own

    def directions(
        self,
        grafting: GraftingConfig,
        parameters: Sequence[torch.Tensor],
        gradients: list[torch.Tensor | None],
        ranks: Ranks,
        guard: Guard | None,
    ) -> list[torch.Tensor | None]:
        """The direction that blocks without a version pass on, and whose length the others take.

        Args:
            grafting: the method; moments advance.
            parameters: of a group.
            gradients: of the group, what this rank holds of them.
            ranks: how the parameters lie.
            guard: see :func:`update_second_moments`.

        Returns:
            Contiguous tensors; None for a parameter without a gradient.
        """
        present = [i for i, g in enumerate(gradients) if g is not None]
        grads = [g for g in gradients if g is not None]
        if not grads:
            return gradients
        if grafting.method in (Grafting.SGD, Grafting.NONE):
            # The gradient is its own direction, and can be overwritten block by block.
            return [g if g is None else g.contiguous() for g in gradients]
        params = [parameters[i] for i in present]
        states = []
        for parameter, gradient in zip(params, grads, strict=True):
            state = self._states.setdefault(parameter, {"step": 0})
            state["step"] += 1
            if needs_second_moment(grafting) and "second_moment" not in state:
                state["second_moment"] = like(parameter, torch.zeros_like(gradient))
            states.append(state)
        moments = [local(s["second_moment"]) for s in states] if needs_second_moment(grafting) else []
        if moments:
            update_second_moments(grafting, moments, grads, guard)
        held = [local(p).detach() for p in params] if owns_weight_decay(grafting) else []
        weights = cast_like(held, grads[: len(held)])
        steps = [s["step"] for s in states]
        found = directions(grafting, grads, moments, steps, weights, 0.0, ranks.norms)
        result: list[torch.Tensor | None] = [None] * len(gradients)
        for position, direction in zip(present, found, strict=True):
            result[position] = direction.contiguous()
        return result
