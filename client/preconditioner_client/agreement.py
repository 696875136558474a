"""What all ranks must agree on before a session opens: its epoch and job, and that they train the same.

:func:`agree` is collective: all ranks of the grid call it in the same step. It moves about a thousand bytes
and happens once per session, never in an ordinary step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from preconditioner_client.distribution import Ranks

_TEXT_BYTES = 1024
_HINT = (
    "make the optimizer alike on all ranks, or give DistributedConfig(process_group=...) with the ranks that "
    "hold the same parameters"
)


@dataclass(frozen=True, slots=True)
class Described:
    """What a parameter must have in common on all ranks.

    Attributes:
        text: its name, shape, dtype and settings.
        held: what this rank holds of it.
    """

    text: str
    held: torch.Tensor


def settings_text(group: dict[str, Any], keys: Iterable[str]) -> str:
    """Settings of a parameter group, for :attr:`Described.text`.

    A tensor on an accelerator is left out, as the host would have to wait for its value.

    Args:
        group: as in ``param_groups``.
        keys: those that count; a group may lack some.
    """
    values = {key: _value(group[key]) for key in keys if key in group}
    return " ".join(f"{key}={value}" for key, value in values.items() if value is not None)


def _value(setting: Any) -> str | None:
    """Of a number, also in a tensor, or a tuple of them; else as it is written."""
    if isinstance(setting, torch.Tensor):
        return str(setting.tolist()) if setting.device.type == "cpu" else None
    if isinstance(setting, (tuple, list)):
        return f"({', '.join(_value(part) or '?' for part in setting)})"
    return str(setting)


def agree(
    ranks: Ranks,
    epoch: int,
    job: str,
    step: int,
    common: str,
    parameters: Sequence[Described],
    device: torch.device,
) -> tuple[int, str]:
    """Agree on a session.

    Args:
        ranks: of the job.
        epoch: that this rank proposes; the largest is taken.
        job: as this rank would call it; the first rank's is taken.
        step: this rank's latest.
        common: settings that are not a parameter's.
        parameters: of all groups, in order.
        device: on which the ranks' process groups exchange.

    Returns:
        Epoch and job, the same on all ranks.

    Raises:
        ValueError: on all ranks: they differ in parameters, settings or steps, or replicas in their weights;
            names the first parameter concerned and what each rank has.
    """
    if not ranks.groups:
        return epoch, job
    texts = [_digest(p.text) for p in parameters]
    values = _checksums(parameters)
    same = _numbers([step, len(texts), _digest(common), *_folded(texts)])
    alike = True
    for group in ranks.groups:
        replicas = group is ranks.replica_group
        record = torch.cat([_numbers([epoch]), same, _numbers(_folded(values)), _text(job)])
        records = _gathered(record, group, device)
        epoch = int(records[:, 0].max())
        job = _untext(records[0, -_TEXT_BYTES // 8 :])
        # Only replicas hold the same values.
        compared = records[:, 1 : 1 + len(same) + (1 if replicas else 0)]
        alike = alike and bool((compared == compared[0]).all())
    if not _all_true(alike, ranks, device):
        raise ValueError(_difference(ranks, step, common, parameters, texts, values, device))
    return epoch, job


def _difference(
    ranks: Ranks,
    step: int,
    common: str,
    parameters: Sequence[Described],
    texts: list[int],
    values: list[int],
    device: torch.device,
) -> str:
    """The first thing in which ranks differ, as all of them tell it."""
    summary = f"at step {step}, {len(texts)} parameters, {common}"
    told = _told(summary, ranks, device)
    if len(set(told.values())) > 1:
        return f"the ranks do not train the same: {_listed(told)}; {_HINT}"
    for kind, digests, groups in (
        ("is not the same parameter on all ranks", texts, ranks.groups),
        ("does not have the same weights on all its replicas", values, (ranks.replica_group,)),
    ):
        first = len(digests)
        for group in groups:
            if group is not None:
                gathered = _gathered(_numbers(digests), group, device)
                differing = (gathered != gathered[0]).any(0).nonzero()
                first = min(first, int(differing[0]) if len(differing) else len(digests))
        first = -_largest(-first, ranks, device)
        if first < len(digests):
            told = _told(parameters[first].text, ranks, device)
            hint = (
                f"; {_HINT}"
                if digests is texts
                else '; wrap the model in DistributedDataParallel, or give distributed="off" if every rank '
                "trains a model of its own"
            )
            return f"{parameters[first].text.split(' ')[0]} {kind}: {_listed(told)}{hint}"
    return f"the ranks do not train the same; {_HINT}"


def _checksums(parameters: Sequence[Described]) -> list[int]:
    """One number per parameter that follows from the bits of its weights."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    held = [p.held.detach() for p in parameters]
    # Those of groups that are left alone may be complex.
    real = [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in held]
    sums = [
        tensor.reshape(-1).view(integers[tensor.element_size()]).sum(dtype=torch.int64) for tensor in real
    ]
    by_device: dict[torch.device, list[int]] = {}
    for position, total in enumerate(sums):
        by_device.setdefault(total.device, []).append(position)
    result = [0] * len(sums)
    for positions in by_device.values():
        for position, value in zip(
            positions, torch.stack([sums[i] for i in positions]).tolist(), strict=True
        ):
            result[position] = value
    return result


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


def _folded(digests: Sequence[int]) -> list[int]:
    return [_digest(",".join(map(str, digests)))]


def _numbers(numbers: Sequence[int]) -> torch.Tensor:
    """On the host, whatever the default device is."""
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


def _text(text: str) -> torch.Tensor:
    """As int64 words; what is too long is cut."""
    return torch.frombuffer(
        bytearray(text.encode()[:_TEXT_BYTES].ljust(_TEXT_BYTES, b"\0")), dtype=torch.int64
    )


def _untext(words: torch.Tensor) -> str:
    return words.contiguous().numpy().tobytes().rstrip(b"\0").decode(errors="replace")


def _gathered(record: torch.Tensor, group: dist.ProcessGroup, device: torch.device) -> torch.Tensor:
    """The group's records as rows, on the CPU."""
    own = record.to(device)
    all_of_them = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(all_of_them, own, group=group)
    return torch.stack(all_of_them).cpu()


def _told(text: str, ranks: Ranks, device: torch.device) -> dict[str, str]:
    """What every rank has to say, by rank; replicas and shards that say the same are still listed apart."""
    words = _text(text).unsqueeze(0)
    labels = _numbers([ranks.rank]).unsqueeze(0)
    for group in ranks.groups:
        words = _gathered(words, group, device).flatten(0, 1)
        labels = _gathered(labels, group, device).flatten(0, 1)
    told = sorted((int(label), _untext(row)) for label, row in zip(labels, words, strict=True))
    return {f"rank {label}": text for label, text in told}


def _listed(told: dict[str, str]) -> str:
    """Ranks that say the same, together."""
    by_text: dict[str, list[str]] = {}
    for rank, text in told.items():
        by_text.setdefault(text, []).append(rank)
    return "; ".join(f"{', '.join(ranks)}: {text}" for text, ranks in by_text.items())


def _largest(value: int, ranks: Ranks, device: torch.device) -> int:
    tensor = torch.tensor([value], device=device)
    for group in ranks.groups:
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=group)
    return int(tensor)


def _all_true(value: bool, ranks: Ranks, device: torch.device) -> bool:
    return _largest(0 if value else 1, ranks, device) == 0
