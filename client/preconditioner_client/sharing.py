"""Finished updates of every block, from its owner to all replicas: one all-gather of one flat buffer a step.

All ranks lay the buffer out alike, from shapes alone: per replica a head, which says which parameters have a
gradient, and the directions of the blocks that it owns. What the owner sent is what every replica applies,
the owner itself included, so replicas stay bit-identical whatever arrived where and whatever the dtype.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from preconditioner_client.distribution import Ranks
from preconditioner_client.plan import GroupPlan
from preconditioner_client.stack import Member
from preconditioner_client.transfer import to_host

_ALIGNMENT = 64  # bytes


@dataclass(frozen=True, slots=True)
class _Slot:
    """Where a block's direction lies in the buffer.

    Attributes:
        group: number of the group.
        member: which block.
        sent: its place in what this rank sends; None if another replica owns it.
        received: its place in what all replicas get.
    """

    group: int
    member: Member
    sent: torch.Tensor | None
    received: torch.Tensor


class SharedUpdates:
    """The buffer, and the collective that fills it.

    Its memory is ``(replicas + 1) x (largest share of a replica)``.

    Args:
        plans: of all groups.
        ranks: with more than one replica.
        device: of the parameters.
    """

    def __init__(self, plans: Sequence[GroupPlan], ranks: Ranks, device: torch.device) -> None:
        self._ranks = ranks
        self._names = [list(plan.names) for plan in plans]
        blocks = [
            (number, block)
            for number, plan in enumerate(plans)
            for block in plan.blocks
            if block.shard == ranks.shard
        ]
        owned = [0] * ranks.replicas
        for _, block in blocks:
            owned[block.replica] += block.member.place.numel
        dtype = ranks.communication_dtype
        self._head = _aligned(sum(len(names) for names in self._names))
        part = self._head + _aligned(max(owned) * dtype.itemsize)
        # Bytes, since not every backend gathers every dtype.
        self._sent = torch.zeros(part, dtype=torch.uint8, device=device)
        self._received = torch.zeros(ranks.replicas, part, dtype=torch.uint8, device=device)
        outgoing = self._sent[self._head :].view(dtype)
        incoming = self._received[:, self._head :].view(dtype)
        self._slots: list[_Slot] = []
        filled = [0] * ranks.replicas
        for number, block in blocks:
            place = block.member.place
            span = slice(filled[block.replica], filled[block.replica] + place.numel)
            filled[block.replica] += place.numel
            own = block.replica == ranks.replica
            self._slots.append(
                _Slot(
                    number,
                    block.member,
                    sent=outgoing[span].view(place.shape) if own else None,
                    received=incoming[block.replica, span].view(place.shape),
                )
            )
        self._pattern: tuple[bool, ...] | None = None
        self._unchecked: deque[tuple[torch.Tensor, torch.cuda.Event | None]] = deque()

    def share(self, updates: Sequence[Sequence[torch.Tensor | None]]) -> None:
        """Replace every block's direction by its owner's.

        Args:
            updates: for each group one contiguous tensor for each parameter, None without a gradient;
                overwritten where blocks are.

        Raises:
            RuntimeError: on all replicas: they had gradients of different parameters; names the first. On an
                accelerator it may come with a later step, since the host does not wait for the answer.
        """
        if not self._slots:
            return
        self._mark(tuple(update is not None for of_group in updates for update in of_group))
        present = [
            (slot, slot.member.view(update))
            for slot in self._slots
            if (update := updates[slot.group][slot.member.parameter]) is not None
        ]
        own = [(slot.sent, view) for slot, view in present if slot.sent is not None]
        if own:
            torch._foreach_copy_([sent for sent, _ in own], [view for _, view in own])
        # The older name is deprecated from torch 2.13 on.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(self._received.view(-1), self._sent, group=self._ranks.replica_group)
        self._check()
        if present:
            torch._foreach_copy_([view for _, view in present], [slot.received for slot, _ in present])

    def _mark(self, pattern: tuple[bool, ...]) -> None:
        """Write the head, if it is not the last step's."""
        if pattern != self._pattern:
            self._pattern = pattern
            self._sent[: len(pattern)] = torch.tensor(pattern, dtype=torch.uint8)

    def _check(self) -> None:
        """Compare the heads of all replicas as soon as they are on the host."""
        assert self._pattern is not None
        # A copy, since the next step overwrites the buffer while this one may still be on its way.
        heads, ready = to_host(self._received[:, : len(self._pattern)].clone())
        self._unchecked.append((heads, ready))
        while self._unchecked and (self._unchecked[0][1] is None or self._unchecked[0][1].query()):
            heads, _ = self._unchecked.popleft()
            differing = (heads != heads[0]).any(0)
            if bool(differing.any()):
                self._refuse(int(differing.nonzero()[0]), heads)

    def _refuse(self, parameter: int, heads: torch.Tensor) -> None:
        names = [name for of_group in self._names for name in of_group]
        with_gradient = heads[:, parameter].nonzero().flatten().tolist()
        raise RuntimeError(
            f"{names[parameter]} has a gradient on the replicas {with_gradient} of {len(heads)} only; "
            f"replicas must have gradients of the same parameters in every step, as DistributedDataParallel "
            f"gives them (with find_unused_parameters=True where some are unused)"
        )


def _aligned(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT
