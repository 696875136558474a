"""Lists of tensors in few launches: torch's foreach operators loop where dtypes or devices are mixed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

Tensors = list[torch.Tensor]


def positions_by_kind(*lists: Sequence[torch.Tensor]) -> Iterable[list[int]]:
    """Positions at which all of some lists, equally long, have one device and one dtype each."""
    kinds: dict[tuple[tuple[torch.device, torch.dtype], ...], list[int]] = {}
    for position, tensors in enumerate(zip(*lists, strict=True)):
        kinds.setdefault(tuple((t.device, t.dtype) for t in tensors), []).append(position)
    return kinds.values()


def picked(tensors: Sequence[torch.Tensor], positions: Sequence[int]) -> Tensors:
    """The tensors at these positions."""
    return [tensors[position] for position in positions]


def copy_all(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copy every tensor into the one of its shape at the same position, whatever its dtype."""
    for positions in positions_by_kind(targets, sources):
        torch._foreach_copy_(picked(targets, positions), picked(sources, positions))


def copies(tensors: Sequence[torch.Tensor]) -> Tensors:
    """The same values in new tensors."""
    found = [torch.empty_like(tensor) for tensor in tensors]
    copy_all(found, tensors)
    return found


def cast(tensors: Sequence[torch.Tensor], dtypes: Sequence[torch.dtype]) -> Tensors:
    """The tensors in these dtypes; those that have theirs already are the same objects."""
    found = list(tensors)
    differing = [i for i, dtype in enumerate(dtypes) if found[i].dtype != dtype]
    for i in differing:
        found[i] = torch.empty_like(tensors[i], dtype=dtypes[i])
    copy_all(picked(found, differing), picked(tensors, differing))
    return found


def cast_like(tensors: Sequence[torch.Tensor], like: Sequence[torch.Tensor]) -> Tensors:
    """The tensors in the dtypes of others; those that have it already are the same objects."""
    return cast(tensors, [tensor.dtype for tensor in like])
