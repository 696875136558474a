"""Factors of all replicas, averaged where they are needed: at the owner of each block, once a step.

Every replica sends each owner the packed upper triangles of the owner's blocks in half precision, each scaled
by its largest value (gradients of a large batch have squares below what float16 can hold), and the owner adds
them up in float32. In bytes that is the reduce-scatter of arXiv 1811.12019, without its rounding of sums.

Rounding takes a factor's small eigenvalues below zero, and the service refuses what is indefinite. Each entry
is off by at most u times itself (u = 2^-11 in float16, 2^-8 in bfloat16), so the whole by at most
``u ||X||_F`` in the spectral norm: the owner adds as much to the diagonal.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist

from preconditioner_client.distribution import Ranks
from preconditioner_client.plan import GroupPlan, PlannedBlock
from preconditioner_client.stack import upper_of

Weighted = tuple[float, Sequence[torch.Tensor]]
"""The number of examples, > 0, and a block's factors summed over them, one for each side."""

Key = tuple[int, int]
"""Number of the group, position of the block among the group's blocks."""


class FactorReduction:
    """The buffers, and the collective that fills them. Their memory is twice ``replicas`` times a share.

    Args:
        plans: of all groups.
        ranks: with more than one replica.
        dtype: that factors travel in.
        device: of the factors.
    """

    def __init__(
        self, plans: Sequence[GroupPlan], ranks: Ranks, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._ranks = ranks
        self._dtype = dtype
        self._device = device
        self._owned = _owned(plans, ranks)
        self._head, self._part = _lengths(self._owned, dtype)
        self._sent = torch.zeros(ranks.replicas, self._part, dtype=torch.uint8, device=device)
        self._received = torch.zeros_like(self._sent)

    @property
    def bytes_per_step(self) -> int:
        """What this replica sends to the others in a reduction."""
        return (self._ranks.replicas - 1) * self._part

    def reduce(
        self, own: Mapping[Key, Weighted], asked: Container[Key] = ()
    ) -> dict[Key, list[torch.Tensor]]:
        """Average the factors of all replicas. Collective.

        Args:
            own: of this replica's batches; a block without any examples is left out.
            asked: blocks that others may have examples of though this replica has none. If it owns one of
                them, the host waits for the answer.

        Returns:
            For each block that this replica owns its averaged factors, if it or, where asked, another replica
            has examples of it.
        """
        for replica, owned in enumerate(self._owned):
            self._fill(self._sent[replica], owned, own)
        dist.all_to_all_single(self._received.view(-1), self._sent.view(-1), group=self._ranks.replica_group)
        head, payload = self._views(self._received)
        places = list(_places(self._owned[self._ranks.replica]))
        open_ones = {key: at for key, _, at, _ in places if key not in own and key in asked}
        others = _having_examples(head, open_ones) if open_ones else ()
        result: dict[Key, list[torch.Tensor]] = {}
        for key, block, at, begin in places:
            if key in own or key in others:
                result[key] = self._averages(head, payload, block, at, begin)
        return result

    def _averages(
        self, head: torch.Tensor, payload: torch.Tensor, block: PlannedBlock, at: int, begin: int
    ) -> list[torch.Tensor]:
        examples = head[:, at].sum()
        sides = []
        for number, n in enumerate(block.sides):
            length = n * (n + 1) // 2
            scale = head[:, at + 1 + number, None]
            packed = payload[:, begin : begin + length].to(torch.float32) * scale
            # Entries beside the diagonal count twice; those on it at most.
            norms = packed.norm(dim=1).sum() * 2**0.5
            average = _unpacked(packed.sum(0) / examples, n)
            average.diagonal().add_(norms * (torch.finfo(self._dtype).eps / 2) / examples)
            sides.append(average)
            begin += length
        return sides

    def _fill(
        self, row: torch.Tensor, owned: Sequence[tuple[Key, PlannedBlock]], own: Mapping[Key, Weighted]
    ) -> None:
        head, payload = (view[0] for view in self._views(row.unsqueeze(0)))
        head.zero_()
        payload.zero_()
        for key, block, at, begin in _places(owned):
            if key not in own:
                continue
            examples, sides = own[key]
            head[at] = examples
            for number, (side, n) in enumerate(zip(sides, block.sides, strict=True)):
                packed = side.reshape(-1)[upper_of(n, self._device)]
                largest = packed.abs().max()
                # A factor of zeros has no scale.
                scale = torch.where(largest > 0, largest, 1.0)
                head[at + 1 + number] = scale
                length = n * (n + 1) // 2
                payload[begin : begin + length] = packed / scale
                begin += length

    def _views(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Numbers of examples and scales, (replicas, ..) float32; and triangles, (replicas, ..)."""
        payload = rows[:, self._head :]
        payload = payload[:, : payload.shape[1] // self._dtype.itemsize * self._dtype.itemsize]
        return rows[:, : self._head].view(torch.float32), payload.view(self._dtype)


def reduction_bytes(plans: Sequence[GroupPlan], ranks: Ranks, dtype: torch.dtype) -> int:
    """Memory of the buffers of :class:`FactorReduction` on every replica; 0 where nothing is reduced."""
    if ranks.replicas == 1 or not any(plan.blocks for plan in plans):
        return 0
    return 2 * ranks.replicas * _lengths(_owned(plans, ranks), dtype)[1]


def _owned(plans: Sequence[GroupPlan], ranks: Ranks) -> list[list[tuple[Key, PlannedBlock]]]:
    """The blocks of each replica."""
    owned: list[list[tuple[Key, PlannedBlock]]] = [[] for _ in range(ranks.replicas)]
    for group, plan in enumerate(plans):
        for position, block in enumerate(plan.blocks):
            owned[block.replica].append(((group, position), block))
    return owned


def _places(
    owned: Sequence[tuple[Key, PlannedBlock]],
) -> Iterator[tuple[Key, PlannedBlock, int, int]]:
    """Each block, where its number of examples stands in the head, and its first triangle in the rest."""
    at = begin = 0
    for key, block in owned:
        yield key, block, at, begin
        at += 1 + len(block.sides)
        begin += sum(n * (n + 1) // 2 for n in block.sides)


def _having_examples(head: torch.Tensor, at: Mapping[Key, int]) -> set[Key]:
    """The blocks that any replica has examples of, given where their numbers stand."""
    counts: list[float] = torch.stack([head[:, place].sum() for place in at.values()]).tolist()
    return {key for key, count in zip(at, counts, strict=True) if count > 0}


def _lengths(owned: Sequence[Sequence[tuple[Key, PlannedBlock]]], dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of the numbers and scales of the largest share, and of all that travels of it."""
    heads = max(sum(1 + len(block.sides) for _, block in of_replica) for of_replica in owned)
    values = max(
        sum(n * (n + 1) // 2 for _, block in of_replica for n in block.sides) for of_replica in owned
    )
    # A multiple of 8 bytes, as views in other dtypes need it.
    return 4 * heads, -(-(4 * heads + dtype.itemsize * values) // 8) * 8


def _unpacked(packed: torch.Tensor, n: int) -> torch.Tensor:
    """A symmetric matrix from its upper triangle."""
    whole = packed.new_zeros(n * n)
    whole[upper_of(n, packed.device)] = packed
    upper = whole.view(n, n)
    return upper + upper.triu(1).mT


def sum_over_replicas(tensors: Sequence[torch.Tensor], ranks: Ranks) -> None:
    """Add up small float32 tensors over all replicas, in place. Collective if there is more than one."""
    if ranks.replica_group is None or not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat, group=ranks.replica_group)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
