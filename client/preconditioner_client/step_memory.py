"""Bytes of what a step has for the moment, from which each optimizer's formula adds up its largest one.

See :mod:`preconditioner_client.memory`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from preconditioner_client.config import Grafting, GraftingConfig
from preconditioner_client.distribution import local
from preconditioner_client.grafting import needs_second_moment, owns_weight_decay
from preconditioner_client.guard import is_deferred
from preconditioner_client.plan import GroupPlan

_NUMBERS_BYTES = 64


def deferred(groups: Sequence[dict[str, Any]]) -> bool:
    """Whether parameters are, or would be, on an accelerator."""
    return any(is_deferred(parameter.device) for group in groups for parameter in group["params"])


def working_bytes(parameters: Iterable[torch.Tensor]) -> int:
    """Of a gradient's working copy of these parameters."""
    return sum(local(p).numel() * max(4, p.element_size()) for p in parameters)


def working_copies(groups: Sequence[dict[str, Any]]) -> int:
    """Of the gradients that are not used as they are, through a whole step."""
    return sum(
        working_bytes(group["params"] if group["maximize"] or _coupled(group) else _half(group))
        for group in groups
    )


class DirectionsBytes(NamedTuple):
    """What there is of a group whose turn it is.

    Attributes:
        filtered: what is preconditioned, if it is not the gradient itself.
        weights: their copies in the dtype of the gradient.
        updates: the diagonal directions.
        denominators: of these, while they are found.
    """

    filtered: int
    weights: int
    updates: int
    denominators: int


def directions_bytes(group: dict[str, Any]) -> DirectionsBytes:
    """While the diagonal directions of a group are found, and preconditioned."""
    working = working_bytes(group["params"])
    return DirectionsBytes(
        filtered=working if group["beta1"] > 0 else 0,
        weights=working_bytes(_half(group)) if owns_weight_decay(group["grafting"]) else 0,
        updates=working,
        denominators=working if needs_second_moment(group["grafting"]) else 0,
    )


def applying_bytes(groups: Sequence[dict[str, Any]]) -> int:
    """The most that there is beside all updates while those of a group are applied."""
    peak = 0
    for group in groups:
        working = working_bytes(group["params"])
        applied = working if group["nesterov"] else 0
        applied += sum(local(p).nbytes for p in _half(group))
        peak = max(peak, applied + (2 * working if deferred(groups) else 0))
    return peak


def stack_bytes(group: dict[str, Any], plan: GroupPlan) -> tuple[int, int]:
    """Most bytes while a stack of this rank is accumulated, and while it is preconditioned."""
    converted = any(p.element_size() > 4 for p in group["params"])
    grafting: GraftingConfig = group["grafting"]
    lengthens, blends = grafting.method is not Grafting.NONE, grafting.blend_steps > 0
    accumulating = preconditioning = 0
    for entry in plan.stacks:
        stack = entry.stack
        size = 4 * len(stack) * stack.members[0].place.numel
        # A single float32 block is looked at where it lies.
        gathered = size if len(stack) > 1 or converted else 0
        gathering = gathered + (2 * size if len(stack) > 1 and converted else 0)
        # One of more than two dimensions is rearranged.
        rearranged = size if len(stack.shape) > 2 else 0
        accumulating = max(accumulating, gathering, gathered + rearranged)
        product = gathered + min(2, len(stack.sides)) * size + rearranged
        lengthened = size + rearranged if lengthens else 0
        grafted = gathered + size + max(lengthened, (lengthens + blends) * size)
        # Rows of averages that do not follow each other are copied, and stay until they are grafted.
        copied = size if stack.averages is not None else 0
        preconditioning = max(preconditioning, product, size + gathering, grafted + copied)
    return accumulating, preconditioning


def numbers_bytes(plans: Sequence[GroupPlan]) -> int:
    """Norms, verdicts and factors: some numbers for every parameter and block."""
    return _NUMBERS_BYTES * sum(len(plan.names) + len(plan.specs) for plan in plans)


def _half(group: dict[str, Any]) -> list[torch.Tensor]:
    """The parameters whose dtype is none to compute in."""
    return [p for p in group["params"] if p.element_size() < 4]


def _coupled(group: dict[str, Any]) -> bool:
    decoupled = group["decoupled_weight_decay"] or owns_weight_decay(group["grafting"])
    return bool(group["weight_decay"]) and not decoupled
