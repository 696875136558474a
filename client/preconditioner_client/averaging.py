"""Momentum as published in 2020: averages of preconditioned gradients, grafted as they are used.

Of the two orders in which momentum and grafting can be applied, ``Shampoo`` has by default that of the
authors' later code: every preconditioned gradient is given its length, and momentum averages these updates.
Here is that of arXiv 2002.09018 and of its authors' code of the time. With the direction d of the diagonal
method and the filtered gradient m, both averages begin at 0:

1. ``a_d <- mu a_d + (1 - dampening) d``, kept as ``momentum_buffer``
2. ``a_p <- mu a_p + (1 - dampening) P_0 m P_1 ..``, for each block
3. ``u = a_p ||a_d|| / ||a_p||``, or ``a_d`` for a block without a usable version

so that a preconditioner that is replaced keeps acting on as many steps as the average spans. A step in which
a block has no usable version brings nothing to its ``a_p``, as a preconditioner of zeros would. Where a
scheduler takes mu to 0, dampening is that of no average, as in the other order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from preconditioner_client.guard import Guard
from preconditioner_client.stack import BlockStack, chosen

PRECONDITIONED = "preconditioned"
GRAFTED = "grafted"
ORDERS = (GRAFTED, PRECONDITIONED)


def order_of(group: dict[str, Any]) -> Any:
    """What momentum averages in a group; those of other optimizers do not say, nor those saved before."""
    return group.get("momentum_of", GRAFTED)


def averages_first(group: dict[str, Any]) -> bool:
    """Whether momentum averages what is grafted only then."""
    return bool(order_of(group) == PRECONDITIONED)


def check_order(group: dict[str, Any]) -> None:
    """Refuse an order that is none, and what an order does not go with.

    Raises:
        ValueError: with what was given, and what is possible.
    """
    order = order_of(group)
    if order not in ORDERS:
        raise ValueError(f"momentum_of must be one of {', '.join(map(repr, ORDERS))}, not {order!r}")
    if not averages_first(group):
        return
    if group["nesterov"]:
        raise ValueError(f"momentum_of={order!r} has no nesterov form: take {GRAFTED!r}, or leave it out")
    if not group["dampening"] < 1:
        raise ValueError(
            f"momentum_of={order!r} needs dampening < 1, not {group['dampening']}, or no gradient enters "
            f"the averages"
        )


def check_kept_order(group: dict[str, Any], planned: str, number: int) -> None:
    """Refuse an order that the blocks of a group were not made for, before a step changes anything.

    Args:
        group: as it is now.
        planned: the order when its blocks were made.
        number: of the group.

    Raises:
        ValueError: it was changed since.
    """
    order = order_of(group)
    if order != planned:
        raise ValueError(
            f"momentum_of of group {number} became {order!r} after its blocks were made for {planned!r}: "
            f"set it back, or make a new optimizer with it"
        )


@dataclass(frozen=True, slots=True)
class Averaging:
    """The momentum of one step.

    Attributes:
        momentum: mu.
        weight: of what a step brings.
        guard: the verdict on the gradients, where the host does not know it.
    """

    momentum: float
    weight: float
    guard: Guard | None

    @classmethod
    def of(cls, group: dict[str, Any], guard: Guard | None) -> Averaging | None:
        """That of a group; None if it averages grafted updates."""
        if not averages_first(group):
            return None
        momentum = group["momentum"]
        return cls(momentum, 1 - group["dampening"] if momentum > 0 else 1.0, guard)

    def average_directions(self, averages: list[torch.Tensor], directions: list[torch.Tensor]) -> None:
        """Step 1: a_d advances, and replaces d."""
        self._decay(averages)
        if self.guard is not None:
            # LARS and LAMB have a direction where the gradient is zero.
            self.guard.clear_(directions)
        torch._foreach_add_(averages, directions, alpha=self.weight)
        torch._foreach_copy_(directions, averages)

    def decay_blocks(self, stack: BlockStack, rows: Sequence[int]) -> None:
        """The first half of step 2, for all blocks whose parameter has a gradient."""
        index = stack.index_of(rows)
        averages = cast(torch.Tensor, stack.averages)
        part = chosen(averages, index)
        self._decay([part])
        stack.put_back(averages, index, part)

    def add_blocks(self, stack: BlockStack, rows: Sequence[int], products: torch.Tensor) -> torch.Tensor:
        """The second half, for those that were preconditioned.

        Args:
            stack: of the blocks.
            rows: the blocks, increasing.
            products: ``P_0 m P_1 ..``, shape ``(len(rows), *shape)``; may be overwritten.

        Returns:
            a_p of these blocks, not to be written to.
        """
        if self.guard is not None:
            # What is filtered is zero only without an average of its own.
            self.guard.clear_([products])
        index = stack.index_of(rows)
        averages = cast(torch.Tensor, stack.averages)
        part = chosen(averages, index)
        part.add_(products, alpha=self.weight)
        stack.put_back(averages, index, part)
        return part

    def _decay(self, tensors: list[torch.Tensor]) -> None:
        if self.guard is None:
            torch._foreach_mul_(tensors, self.momentum)
        else:
            self.guard.decay_(tensors, self.momentum)
