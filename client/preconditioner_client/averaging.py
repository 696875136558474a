"""Momentum as published in 2020: averages of preconditioned gradients, grafted as they are used.

Of the two orders in which momentum and grafting can be applied, ``Shampoo`` has by default that of the
authors' later code: every preconditioned gradient is given its length, and momentum averages these updates.
Here is that of arXiv 2002.09018 and of its authors' code of the time. With the direction d of the diagonal
method and the filtered gradient m, both averages begin at 0:

1. ``a_d <- mu a_d + (1 - dampening) d``
2. ``a_p <- mu a_p + (1 - dampening) P_0 m P_1 ..``, for each block
3. ``u = a_p ||a_d|| / ||a_p||``, or ``a_d`` for a block without a usable version

so that a preconditioner that is replaced keeps acting on as many steps as the average spans. A step in which
a block has no usable version brings nothing to its ``a_p``, as a preconditioner of zeros would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from preconditioner_client.guard import Guard
from preconditioner_client.stack import BlockStack, chosen

PRECONDITIONED = "preconditioned"
GRAFTED = "grafted"
ORDERS = (GRAFTED, PRECONDITIONED)


def averages_first(group: dict[str, Any]) -> bool:
    """Whether momentum averages what is grafted only then; groups of other optimizers do not say."""
    return bool(group.get("momentum_of", GRAFTED) == PRECONDITIONED)


@dataclass(frozen=True, slots=True)
class Averaging:
    """The momentum of one step.

    Attributes:
        momentum: mu.
        weight: ``1 - dampening``, of what a step brings.
        guard: the verdict on the gradients, where the host does not know it.
    """

    momentum: float
    weight: float
    guard: Guard | None

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
        part = chosen(_averages_of(stack), index)
        self._decay([part])
        stack.put_back(_averages_of(stack), index, part)

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
        part = chosen(_averages_of(stack), index)
        part.add_(products, alpha=self.weight)
        stack.put_back(_averages_of(stack), index, part)
        return part

    def _decay(self, tensors: list[torch.Tensor]) -> None:
        if self.guard is None:
            torch._foreach_mul_(tensors, self.momentum)
        else:
            self.guard.decay_(tensors, self.momentum)


def _averages_of(stack: BlockStack) -> torch.Tensor:
    if stack.averages is None:
        raise ValueError(
            "momentum_of became 'preconditioned' after the blocks of its group were made, which have no "
            "averages: give it when the group is made"
        )
    return stack.averages
