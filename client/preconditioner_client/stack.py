"""Equal blocks, stacked: statistics, preconditioners and the products with them, one batched call for all.

All blocks of one shape in a parameter group live in one :class:`BlockStack`, whatever parameter they belong
to, so that the number of kernel launches does not grow with the number of blocks. Shapes in comments: B
blocks, ``d0 .. dk`` the dimensions of a block, n the length of the preconditioned side at hand, r the product
of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache

import torch

from preconditioner_client.blocks import BlockSlice
from preconditioner_client.config import Accumulation, StatisticsConfig
from preconditioner_client.guard import Guard
from preconditioner_client.transfer import keep_until_used, to_host, upload
from preconditioner_protos import upper_indices


@dataclass(frozen=True, slots=True)
class Member:
    """One block of a stack.

    Attributes:
        parameter: position of its parameter in the group.
        number: position of the block in its parameter's partition.
        merged: shape of the parameter after merging.
        place: where the block lies in the merged parameter.
    """

    parameter: int
    number: int
    merged: tuple[int, ...]
    place: BlockSlice

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """The block in a tensor of the parameter's shape."""
        merged = tensor.reshape(self.merged)
        return merged if self.place.shape == self.merged else merged[self.place.slices]


@dataclass(frozen=True, slots=True)
class Taken:
    """Snapshots of some rows of a stack.

    Attributes:
        sides: per row, per side a 1-D float32 CPU tensor of ``n (n + 1) / 2`` values.
        ready: see :class:`preconditioner_client.exchange.Snapshot`.
    """

    sides: list[tuple[torch.Tensor, ...]]
    ready: torch.cuda.Event | None


class BlockStack:
    """Statistics and preconditioners of B blocks of one shape.

    Args:
        members: the blocks.
        preconditioned: their dimensions that have a preconditioner.
        statistics: how they are accumulated.
        device: of the parameters.
        averages: whether momentum averages preconditioned gradients, which are kept here then.
    """

    def __init__(
        self,
        members: Sequence[Member],
        preconditioned: tuple[int, ...],
        statistics: StatisticsConfig,
        device: torch.device,
        averages: bool = False,
    ) -> None:
        self.members = tuple(members)
        self.shape = self.members[0].place.shape
        self.preconditioned = preconditioned
        self.config = statistics
        self.device = device
        count = len(self.members)
        self.sides = tuple(self.shape[dim] for dim in preconditioned)
        # Per preconditioned side (B, n, n), float32 whatever the parameters are.
        self.statistics, self.preconditioners = (
            [torch.zeros(count, n, n, dtype=torch.float32, device=device) for n in self.sides]
            for _ in range(2)
        )
        # (B, d0 .. dk)
        self.averages = (
            torch.zeros(count, *self.shape, dtype=torch.float32, device=device) if averages else None
        )
        # Accumulations so far, per block: blocks of one stack may miss gradients in different steps.
        self.updates = [0] * count

    def __len__(self) -> int:
        return len(self.members)

    def gather(self, tensors: Sequence[torch.Tensor | None], rows: Sequence[int]) -> torch.Tensor:
        """The given rows' blocks of a list of tensors, one for each parameter of the group.

        Returns:
            float32 tensor of shape ``(len(rows), *shape)``; it may share memory with its source.
        """
        views = []
        for row in rows:
            tensor = tensors[self.members[row].parameter]
            if tensor is None:
                raise ValueError(f"row {row} has no tensor")
            views.append(self.members[row].view(tensor))
        stacked = views[0].unsqueeze(0) if len(views) == 1 else torch.stack(views)
        return stacked.to(torch.float32)

    def scatter(
        self, blocks: torch.Tensor, tensors: Sequence[torch.Tensor | None], rows: Sequence[int]
    ) -> None:
        """Write blocks of shape ``(len(rows), *shape)`` to their places; the inverse of :meth:`gather`.

        The tensors must be contiguous, since a reshaped copy would swallow what is written.
        """
        views = []
        for row in rows:
            member = self.members[row]
            tensor = tensors[member.parameter]
            if tensor is None or not tensor.is_contiguous():
                raise ValueError(f"row {row} has no contiguous tensor to be written to")
            views.append(member.view(tensor))
        torch._foreach_copy_(views, list(blocks.unbind(0)))

    def accumulate(self, gradients: torch.Tensor, rows: Sequence[int], guard: Guard | None = None) -> None:
        """``S_i <- S_i + G_(i) G_(i)ᵀ`` or its EMA, for each preconditioned side i.

        arXiv 1802.09568, algorithm 2.

        Args:
            gradients: shape ``(len(rows), *shape)``.
            rows: the blocks that they belong to, increasing.
            guard: the verdict on the gradients, where the host does not know it; they are zero then.
        """
        ema = self.config.accumulation is Accumulation.EMA
        beta, alpha = (self.config.beta, 1 - self.config.beta) if ema else (1.0, 1.0)
        index = self.index_of(rows)
        with _without_autocast(self.device):
            for statistics, dim in zip(self.statistics, self.preconditioned, strict=True):
                unfolded = _unfold(gradients, dim)  # (b, n, r)
                part = chosen(statistics, index)
                if guard is not None and ema:
                    guard.decay_([part], beta)
                part.baddbmm_(unfolded, unfolded.mT, beta=beta if guard is None else 1.0, alpha=alpha)
                self.put_back(statistics, index, part)
        for row in rows:
            self.updates[row] += 1

    def precondition(self, blocks: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """Multiply every preconditioned side by its preconditioner: ``P_0 M P_1`` for a matrix.

        Args:
            blocks: shape ``(len(rows), *shape)``.
            rows: the blocks that they belong to, increasing.

        Returns:
            New tensor of the same shape.
        """
        index = self.index_of(rows)
        result = blocks
        with _without_autocast(self.device):
            for preconditioners, dim in zip(self.preconditioners, self.preconditioned, strict=True):
                factor = chosen(preconditioners, index)
                if dim == 0:
                    # (b, n, n) @ (b, n, r), without moving the dimension.
                    result = torch.bmm(factor, result.flatten(2)).view(result.shape)
                    continue
                moved = result.movedim(dim + 1, -1)
                product = torch.bmm(moved.flatten(1, -2), factor).view(moved.shape)
                result = product.movedim(-1, dim + 1)
        return result

    def snapshot(self, rows: Sequence[int]) -> Taken:
        """Packed upper triangles of the (bias-corrected) statistics of the given blocks.

        They are gathered on this stack's device, which halves the bytes, and the host waits for nothing.
        """
        index = upload(rows, torch.int64, self.device).unsqueeze(1)
        packed_sides = []
        for statistics, n, scale in zip(self.statistics, self.sides, self._scales(rows), strict=True):
            # One gather straight from the stack: (b, n (n + 1) / 2)
            packed = statistics.view(len(self), -1)[index, upper_of(n, self.device)]
            if scale is not None:
                packed.mul_(scale.unsqueeze(1))
            packed_sides.append(to_host(packed))
        # Copies of one stream are done in order: the last event stands for all.
        ready = packed_sides[-1][1]
        unbound = [host.unbind(0) for host, _ in packed_sides]
        return Taken([tuple(side[i] for side in unbound) for i in range(len(rows))], ready)

    def corrections(self, rows: Sequence[int]) -> torch.Tensor | None:
        """What turns the given blocks' EMA into averages: (len(rows),); None: nothing has to."""
        if self.config.accumulation is not Accumulation.EMA or not self.config.bias_correction:
            return None
        factors = [1.0 / (1 - self.config.beta ** max(1, self.updates[row])) for row in rows]
        return upload(factors, torch.float32, self.device)

    def _scales(self, rows: Sequence[int]) -> Sequence[torch.Tensor | None]:
        """Per side what snapshots of the given blocks are multiplied by: (len(rows),); None: 1."""
        return [self.corrections(rows)] * len(self.sides)

    def adopt(self, rows: Sequence[int], sides: Sequence[Sequence[torch.Tensor]]) -> None:
        """Take new preconditioners into use.

        They are copied to their rows rather than taken by reference: a batched product needs the blocks of a
        stack side by side, and would else have to gather all of them in every step. Between two steps this
        is as whole as swapping a reference; it is one launch, on the stream of training, whose steps before
        it still read the old rows.

        Args:
            rows: the blocks.
            sides: per row, per side a float32 tensor of shape (n, n), best on this stack's device.
        """
        for number, preconditioners in enumerate(self.preconditioners):
            rows_of = [preconditioners[row] for row in rows]
            new = [of_row[number] for of_row in sides]
            torch._foreach_copy_(rows_of, new)
            keep_until_used(new)

    def put_back(self, tensor: torch.Tensor, index: slice | torch.Tensor, part: torch.Tensor) -> None:
        """Write what :func:`chosen` gave of a tensor back, if it was a copy."""
        if isinstance(index, torch.Tensor):
            tensor.index_copy_(0, index, part)

    def index_of(self, rows: Sequence[int]) -> slice | torch.Tensor:
        """The rows as a slice, which takes a view, where they follow each other."""
        if rows[-1] - rows[0] + 1 == len(rows):
            return slice(rows[0], rows[-1] + 1)
        return upload(rows, torch.int64, self.device)


def chosen(tensor: torch.Tensor, index: slice | torch.Tensor) -> torch.Tensor:
    """Rows of a tensor: a view for a slice, else a copy."""
    return tensor[index] if isinstance(index, slice) else tensor.index_select(0, index)


@cache
def upper_of(n: int, device: torch.device) -> torch.Tensor:
    """Flat indices of an upper triangle, row by row: (n (n + 1) / 2,) int64."""
    return upload(upper_indices(n), torch.int64, device)


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast off: a step inside of it would round the operands of every product to half precision."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def _unfold(blocks: torch.Tensor, dim: int) -> torch.Tensor:
    """``(b, d0 .. dk)`` as ``(b, n, r)`` with n the given dimension."""
    return blocks.movedim(dim + 1, 1).flatten(2)
