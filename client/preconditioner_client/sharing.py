"""Finished updates of every block, from its owner to all replicas: collectives over flat buffers, every step.

All ranks lay the buffers out alike, from shapes alone: per replica the directions of the blocks that it owns,
and before those of the first bucket a head, which says which parameters have a gradient. There is one bucket,
filled and gathered when all blocks are done; or, if overlap was asked for, many, each of which is under way
while the blocks of the next are preconditioned. What the owner sent is what every replica applies, the owner
itself included, so replicas stay bit-identical whatever arrived where and whatever the dtype.

In an all-gather every replica takes up as much as the one with the largest share. A block that is longer than
two equal shares, as a vocabulary's among many replicas, is broadcast by its owner instead, at its own length.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from preconditioner_client.distribution import Ranks
from preconditioner_client.plan import GroupPlan, PlannedBlock, StackPlan
from preconditioner_client.stack import Member
from preconditioner_client.transfer import to_host, upload

_ALIGNMENT = 64  # bytes
_JOINS = 2
"""In the head of what is sent, instead of 0 or 1: this replica makes no step, see ``announce``."""

Updates = Sequence[torch.Tensor | None]
"""One tensor for each parameter of a group; None without a gradient."""


@dataclass(frozen=True, slots=True)
class _Slot:
    """Where a block's direction lies in the buffer.

    Attributes:
        group: number of the group.
        member: which block.
        sent: its place in what this rank sends; None if another replica owns it. In a broadcast it is
            ``received`` itself.
        received: its place in what all replicas get.
    """

    group: int
    member: Member
    sent: torch.Tensor | None
    received: torch.Tensor


@dataclass(slots=True)
class _Bucket:
    """What one all-gather carries, and the broadcasts after it.

    Attributes:
        group: the last group that has blocks in it.
        sent: bytes of this replica, to be gathered.
        received: bytes of all replicas, one row for each.
        slots: the blocks of all replicas.
        broadcasts: replicas that own long blocks, and the bytes of these.
        unfinished: pieces of this rank's stacks that it waits for in this step.
        works: the collectives under way.
    """

    group: int
    sent: torch.Tensor
    received: torch.Tensor
    slots: list[_Slot]
    broadcasts: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    unfinished: int = 0
    works: list[dist.Work] = field(default_factory=list)

    def wait(self) -> None:
        """For what is under way."""
        for work in self.works:
            work.wait()
        self.works.clear()


@dataclass(slots=True)
class _Piece:
    """Rows of one stack of this rank that travel together."""

    bucket: int
    rows: list[int] = field(default_factory=list)


class SharedUpdates:
    """The buffers, and the collectives that fill them.

    Their memory is ``replicas + 1`` times, summed over buckets, the largest share of a replica, and once that
    of the blocks which are broadcast.

    A step is :meth:`begin`, then for each group in order :meth:`begin_group`, :meth:`finished` for every one
    of its :meth:`pieces` and :meth:`end_group`, and at last :meth:`complete`. Groups without any gradient may
    be left out.

    Args:
        plans: of all groups.
        ranks: with more than one replica.
        device: of the parameters.
    """

    def __init__(self, plans: Sequence[GroupPlan], ranks: Ranks, device: torch.device) -> None:
        self._ranks = ranks
        self._names = [list(plan.names) for plan in plans]
        contents = bucketed(plans, ranks)
        head = _aligned(sum(len(names) for names in self._names))
        self._buckets = [
            self._bucket(content, head if number == 0 else 0, device)
            for number, content in enumerate(contents)
        ]
        number_of = {
            (group, block.member.parameter, block.key): number
            for number, content in enumerate(contents)
            for group, block in content
        }
        self._pieces: dict[int, list[_Piece]] = {}
        for group, plan in enumerate(plans):
            for rows in plan.rows:
                for held in rows:
                    pieces = self._pieces.setdefault(held.entry.first, [])
                    parameter = held.entry.stack.members[held.row].parameter
                    number = number_of[group, parameter, held.key]
                    piece = next((p for p in pieces if p.bucket == number), None)
                    if piece is None:
                        pieces.append(piece := _Piece(number))
                    piece.rows.append(held.row)
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: piece.bucket)
            for piece in pieces:
                piece.rows.sort()
        self._launched = 0
        self._updates: dict[int, Updates] = {}
        self._pattern: tuple[bool, ...] | None = None
        self._unchecked: deque[tuple[torch.Tensor, torch.cuda.Event | None]] = deque()

    def _bucket(self, content: list[tuple[int, PlannedBlock]], head: int, device: torch.device) -> _Bucket:
        ranks, dtype = self._ranks, self._ranks.communication_dtype
        gathered, broadcast = _parted(content, ranks.replicas)
        owned = _owned(gathered, ranks.replicas)
        part = head + _aligned(max(owned) * dtype.itemsize)
        # Bytes, since not every backend gathers every dtype.
        sent = torch.zeros(part, dtype=torch.uint8, device=device)
        received = torch.zeros(ranks.replicas, part, dtype=torch.uint8, device=device)
        outgoing = sent[head:].view(dtype)
        incoming = received[:, head:].view(dtype)
        slots = []
        filled = [0] * ranks.replicas
        for group, block in gathered:
            place = block.member.place
            span = slice(filled[block.replica], filled[block.replica] + place.numel)
            filled[block.replica] += place.numel
            own = block.replica == ranks.replica
            slots.append(
                _Slot(
                    group,
                    block.member,
                    sent=outgoing[span].view(place.shape) if own else None,
                    received=incoming[block.replica, span].view(place.shape),
                )
            )
        bucket = _Bucket(content[-1][0], sent, received, slots)
        for group, block in broadcast:
            place = block.member.place
            alone = torch.zeros(place.numel * dtype.itemsize, dtype=torch.uint8, device=device)
            view = alone.view(dtype).view(place.shape)
            own = block.replica == ranks.replica
            slots.append(_Slot(group, block.member, sent=view if own else None, received=view))
            bucket.broadcasts.append((block.replica, alone))
        return bucket

    @property
    def groups(self) -> int:
        """How many parameter groups there are."""
        return len(self._names)

    @property
    def _marks(self) -> int:
        """Bytes of the head."""
        return sum(len(names) for names in self._names)

    def pieces(self, entry: StackPlan) -> list[_Piece]:
        """The rows of a stack of this rank in the pieces in which they are best finished, in order."""
        return self._pieces[entry.first]

    def begin(self, gradients: Sequence[Updates]) -> None:
        """A new step.

        Args:
            gradients: for each group; which parameters have one is told to the other replicas.
        """
        self._reset()
        for pieces in self._pieces.values():
            for piece in pieces:
                self._buckets[piece.bucket].unfinished += 1
        if self._buckets:
            self._mark(tuple(gradient is not None for of_group in gradients for gradient in of_group))

    def announce(self, reason: str) -> None:
        """Instead of a step: this replica is about to compare itself with all others, and so must they be.

        One that made its step meanwhile would take the comparison for updates: some backends end the process
        then, others wait for ever, or mix the two.

        Args:
            reason: what this replica has done.

        Raises:
            RuntimeError: some replicas make a step; it is raised there, too, see :meth:`complete`.
        """
        if not self._buckets:
            return
        self._reset()
        self._pattern = None
        self._buckets[0].sent[: self._marks].fill_(_JOINS)
        while self._launched < len(self._buckets):
            self._launch(self._buckets[self._launched])
        for bucket in self._buckets:
            bucket.wait()
        heads = self._buckets[0].received[:, : self._marks].cpu()
        if not bool((heads == _JOINS).all()):
            self._refuse_joining(heads, f" (here {reason})")

    def _reset(self) -> None:
        for bucket in self._buckets:
            bucket.wait()  # a step before may have been broken off
            bucket.unfinished = 0
        self._launched = 0
        self._updates.clear()

    def begin_group(self, group: int, updates: Updates) -> None:
        """The next group's turn.

        Args:
            group: its number.
            updates: contiguous; those of this rank's blocks are final as soon as :meth:`finished` says so.
        """
        self._updates[group] = updates

    def finished(self, group: int, piece: _Piece) -> None:
        """The directions of a piece are final: what is whole now is sent."""
        self._buckets[piece.bucket].unfinished -= 1
        while self._launched < len(self._buckets):
            bucket = self._buckets[self._launched]
            # Not beyond this group, so that other collectives come between the same two on all ranks.
            if bucket.unfinished or bucket.group > group or self._ranks.bucket_bytes is None:
                return
            self._launch(bucket)

    def end_group(self, group: int) -> None:
        """All directions of a group are final."""
        if self._ranks.bucket_bytes is None:
            return
        while self._launched < len(self._buckets) and self._buckets[self._launched].group <= group:
            self._launch(self._buckets[self._launched])

    def complete(self, updates: Sequence[Updates]) -> None:
        """Wait for what is under way, and replace every block's direction by its owner's.

        Args:
            updates: for each group; overwritten where blocks are.

        Raises:
            RuntimeError: on all replicas: they had gradients of different parameters; names the first. Or
                some have joined another session. On an accelerator it may come with a later step, since the
                host does not wait for the answer.
        """
        if not self._buckets:
            return
        self._updates.update(enumerate(updates))
        while self._launched < len(self._buckets):
            self._launch(self._buckets[self._launched])
        for bucket in self._buckets:
            bucket.wait()
        self._updates.clear()
        self._check()
        present = [
            (slot.member.view(update), slot.received)
            for bucket in self._buckets
            for slot in bucket.slots
            if (update := updates[slot.group][slot.member.parameter]) is not None
        ]
        if present:
            torch._foreach_copy_([view for view, _ in present], [received for _, received in present])

    def _launch(self, bucket: _Bucket) -> None:
        own = []
        for slot in bucket.slots:
            if slot.sent is not None and slot.group in self._updates:
                update = self._updates[slot.group][slot.member.parameter]
                if update is not None:
                    own.append((slot.sent, slot.member.view(update)))
        if own:
            torch._foreach_copy_([sent for sent, _ in own], [view for _, view in own])
        # The older name is deprecated from torch 2.13 on.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        overlapped = self._ranks.bucket_bytes is not None
        works = []
        if bucket.sent.numel():
            works.append(
                gather(
                    bucket.received.view(-1),
                    bucket.sent,
                    group=self._ranks.replica_group,
                    async_op=overlapped,
                )
            )
        for replica, alone in bucket.broadcasts:
            owner = self._ranks.grid[replica][self._ranks.shard]
            works.append(dist.broadcast(alone, owner, group=self._ranks.replica_group, async_op=overlapped))
        bucket.works = [work for work in works if work is not None]
        self._launched += 1

    def _mark(self, pattern: tuple[bool, ...]) -> None:
        """Write the head, if it is not the last step's."""
        if pattern != self._pattern:
            self._pattern = pattern
            sent = self._buckets[0].sent
            sent[: len(pattern)].copy_(upload(pattern, torch.uint8, sent.device))

    def _check(self) -> None:
        """Compare the heads of all replicas as soon as they are on the host."""
        assert self._pattern is not None
        # A copy, since the next step overwrites the buffer while this one may still be on its way.
        heads, ready = to_host(self._buckets[0].received[:, : len(self._pattern)].clone())
        self._unchecked.append((heads, ready))
        while self._unchecked and (self._unchecked[0][1] is None or self._unchecked[0][1].query()):
            read = self._unchecked.popleft()[0]
            if bool((read == _JOINS).any()):
                self._refuse_joining(read)
            marks = read.numpy()
            differing = (marks != marks[0]).any(axis=0)
            if differing.any():
                parameter = int(differing.argmax())
                self._refuse(parameter, marks[:, parameter].nonzero()[0].tolist())

    def _refuse_joining(self, heads: torch.Tensor, reason: str = "") -> None:
        joining = (heads == _JOINS).any(1).nonzero().flatten().tolist()
        raise RuntimeError(
            f"only the replicas {joining} of {self._ranks.replicas} have new parameters or a state that was "
            f"loaded since the last step{reason}; call add_param_group() and load_state_dict() on all ranks "
            f"between the same two steps"
        )

    def _refuse(self, parameter: int, with_gradient: list[int]) -> None:
        names = [name for of_group in self._names for name in of_group]
        raise RuntimeError(
            f"{names[parameter]} has a gradient on the replicas {with_gradient} of {self._ranks.replicas} "
            f"only; replicas must have gradients of the same parameters in every step, as "
            f"DistributedDataParallel gives them (with find_unused_parameters=True where some are unused)"
        )


def bucketed(plans: Sequence[GroupPlan], ranks: Ranks) -> list[list[tuple[int, PlannedBlock]]]:
    """The blocks of this rank's shard by the all-gather that carries them, each with the number of its group.

    Follows from shapes and settings alone, so that all replicas come to the same answer.
    """
    of_shard = [[block for block in plan.blocks if block.shard == ranks.shard] for plan in plans]
    if ranks.bucket_bytes is None:
        everything = [(group, block) for group, blocks in enumerate(of_shard) for block in blocks]
        return [everything] if everything else []
    buckets: list[list[tuple[int, PlannedBlock]]] = []
    for group, blocks in enumerate(of_shard):
        of_group: dict[int, list[tuple[int, PlannedBlock]]] = {}
        given = [0] * ranks.replicas
        for block in blocks:
            of_group.setdefault(given[block.replica] // ranks.bucket_bytes, []).append((group, block))
            given[block.replica] += block.member.place.numel * ranks.communication_dtype.itemsize
        buckets.extend(of_group[number] for number in sorted(of_group))
    return buckets


def gather_bytes(plans: Sequence[GroupPlan], ranks: Ranks) -> int:
    """Memory of the buffers of :class:`SharedUpdates` on every replica."""
    head = _aligned(sum(len(plan.names) for plan in plans))
    parted = [_parted(content, ranks.replicas) for content in bucketed(plans, ranks)]
    if not parted or ranks.replicas == 1:
        return 0
    width = ranks.communication_dtype.itemsize
    parts = [_aligned(max(_owned(gathered, ranks.replicas)) * width) for gathered, _ in parted]
    broadcast = sum(block.member.place.numel for _, alone in parted for _, block in alone)
    return (ranks.replicas + 1) * (head + sum(parts)) + broadcast * width


def _parted(
    content: Sequence[tuple[int, PlannedBlock]], replicas: int
) -> tuple[list[tuple[int, PlannedBlock]], list[tuple[int, PlannedBlock]]]:
    """The blocks of a bucket that are gathered, and the long ones, fewer than half the replicas."""
    longest = 2 * sum(block.member.place.numel for _, block in content) / replicas
    gathered = [(group, block) for group, block in content if block.member.place.numel <= longest]
    return gathered, [(group, block) for group, block in content if block.member.place.numel > longest]


def _owned(content: Sequence[tuple[int, PlannedBlock]], replicas: int) -> list[int]:
    """Values that each replica contributes."""
    owned = [0] * replicas
    for _, block in content:
        owned[block.replica] += block.member.place.numel
    return owned


def _aligned(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT
