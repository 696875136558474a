"""How much memory an optimizer takes beside parameters and gradients, from shapes and settings alone.

The formula, in bytes, with e the number of elements that this rank holds of a parameter, w their working
size (4, or 8 for float64), and over the blocks that this rank owns, of sides n:

======================  ==========================================================================
what                    bytes
======================  ==========================================================================
``statistics``          4 n² for every preconditioned side
``preconditioners``     4 n² for every preconditioned side
``moments``             w e for each of: gradient's EMA (``beta1 > 0``), second moment of the grafting
                        method, momentum
``triangles``           8 n (n + 1) / 2 for every different n: the indices that snapshots are packed with
``gather_buffers``      (replicas + 1) x c x the values of the largest share of a replica, c the bytes of
                        the communication's dtype, summed over buckets
``temporaries``         the largest moment of a step: two to three w e, and three to four times the
                        largest stack of equal blocks; see :func:`_temporaries`
``outbox``              k 4 n (n + 1) / 2 for every side: snapshots, packed; k how many of a block may be
                        under way (1 but for a schedule)
``inbox``               k 4 n² for every side: preconditioners between arrival and adoption
``in_flight``           what the service may have sent without receipt: at most ``credit_bytes``
======================  ==========================================================================

The last three are the host's; on an accelerator preconditioners are there, too, before their adoption, and
snapshots on their way out, which then counts as ``arrivals`` and within ``temporaries``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from preconditioner_client.config import StalenessConfig
from preconditioner_client.distribution import DistributedConfig, Ranks, is_dtensor, local
from preconditioner_client.grafting import needs_second_moment, owns_weight_decay
from preconditioner_client.guard import is_deferred
from preconditioner_client.plan import GroupPlan, GroupSettings, Loads, plan_group
from preconditioner_client.sharing import gather_bytes
from preconditioner_protos import packed_length

_NUMBERS_BYTES = 64


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes on one rank, see :mod:`preconditioner_client.memory`. All are upper bounds."""

    statistics: int
    preconditioners: int
    moments: int
    triangles: int
    gather_buffers: int
    arrivals: int
    temporaries: int
    outbox: int
    inbox: int
    in_flight: int

    @property
    def host(self) -> int:
        """What is on the host whatever the parameters' device is."""
        return self.outbox + self.inbox + self.in_flight

    @property
    def persistent(self) -> int:
        """What is on the parameters' device between two steps."""
        return self.device - self.temporaries - self.arrivals

    @property
    def device(self) -> int:
        """The peak on the parameters' device."""
        return self.total - self.host

    @property
    def total(self) -> int:
        """The peak of both together."""
        return sum(getattr(self, field.name) for field in fields(self))


def estimate_memory(
    groups: Sequence[dict[str, Any]],
    staleness: StalenessConfig,
    distributed: str | DistributedConfig,
    replicas: int | None,
    replica: int,
    credit_bytes: int,
) -> MemoryEstimate:
    """The formula, for the parameter groups of a ``Shampoo`` whose parameters all have gradients.

    Args:
        groups: as in ``param_groups``.
        staleness: of the optimizer.
        distributed: of the optimizer.
        replicas: see ``Shampoo.estimate_memory``.
        replica: see ``Shampoo.estimate_memory``.
        credit_bytes: see :class:`ServiceConfig`.

    Raises:
        ValueError: see ``Shampoo.estimate_memory``.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    ranks = _ranks_as_if(distributed, parameters, replicas, replica)
    loads = Loads()
    plans: list[GroupPlan] = []
    for group in groups:
        settings = GroupSettings(
            blocking=group["blocking"], statistics=group["statistics"], root=group["root"]
        )
        shapes = [torch.empty(p.shape, device="meta") for p in group["params"]]
        first = sum(len(plan.specs) for plan in plans)
        plans.append(plan_group(settings, shapes, [""] * len(shapes), first, ranks, loads))
    deferred = any(is_deferred(parameter.device) for parameter in parameters)
    sides = [n for plan in plans for spec in plan.specs for n in spec.sides]
    full, packed = 4 * sum(n * n for n in sides), 4 * sum(map(packed_length, sides))
    under_way = staleness.snapshots_in_flight
    return MemoryEstimate(
        statistics=full,
        preconditioners=full,
        moments=sum(_moments(group) for group in groups),
        triangles=8 * sum(map(packed_length, set(sides))),
        gather_buffers=gather_bytes(plans, ranks),
        arrivals=under_way * full if deferred else 0,
        temporaries=_temporaries(groups, plans, deferred, packed),
        outbox=under_way * packed,
        inbox=under_way * full,
        in_flight=min(under_way * packed, credit_bytes),
    )


def _ranks_as_if(
    distributed: str | DistributedConfig,
    parameters: Sequence[torch.Tensor],
    replicas: int | None,
    replica: int,
) -> Ranks:
    """How parameters lie over ranks, or would with that many replicas."""
    if replicas is None:
        return Ranks.of(distributed, parameters, [""] * len(parameters))
    if not 0 <= replica < replicas:
        raise ValueError(f"replica must be in [0, {replicas}), not {replica}")
    if any(is_dtensor(parameter) for parameter in parameters):
        raise ValueError("DTensor parameters bring their own mesh: leave replicas out")
    settings = distributed if isinstance(distributed, DistributedConfig) else DistributedConfig()
    return Ranks(
        replica=replica,
        replicas=replicas,
        communication_dtype=settings.communication_dtype,
        bucket_bytes=settings.bucket_bytes if settings.overlap else None,
    )


def _working(parameters: Sequence[torch.Tensor]) -> int:
    """Bytes of a gradient's working copy of these parameters."""
    return sum(local(p).numel() * max(4, p.element_size()) for p in parameters)


def _moments(group: dict[str, Any]) -> int:
    kinds: int = (group["beta1"] > 0) + needs_second_moment(group["grafting"]) + (group["momentum"] > 0)
    return kinds * _working(group["params"])


def _temporaries(
    groups: Sequence[dict[str, Any]], plans: Sequence[GroupPlan], deferred: bool, packed: int
) -> int:
    """The largest moment of a step, beside what stays and what is under way.

    Gradients that are not used as they are (half precision, coupled weight decay, ``maximize``) have a
    working copy through the whole step, and every group that has had its turn has its updates. Group by group
    there are, beside these: while statistics are accumulated, a stack; while directions are found, the
    filtered gradient, the denominators and the directions; while blocks are preconditioned, the filtered
    gradient, the directions, and some copies of a stack; while updates are applied, their converted copies.
    """
    copies = 0
    for group in groups:
        changed = group["maximize"] or _coupled(group)
        copies += _working([p for p in group["params"] if changed or p.element_size() < 4])
    peak = copies + (packed if deferred else 0)
    updates = 0
    for group, plan in zip(groups, plans, strict=True):
        working = _working(group["params"])
        filtered = working if group["beta1"] > 0 else 0
        half = _working([p for p in group["params"] if p.element_size() < 4])
        weights = half if owns_weight_decay(group["grafting"]) else 0
        denominators = working if needs_second_moment(group["grafting"]) else 0
        accumulating, preconditioning = _stacks(group, plan)
        peak = max(peak, copies + accumulating)
        found = copies + updates + filtered + weights + working
        peak = max(peak, found + max(denominators, preconditioning))
        updates += working
    for group in groups:
        working = _working(group["params"])
        applied = working if group["nesterov"] else 0
        applied += sum(local(p).nbytes for p in group["params"] if p.element_size() < 4)
        if deferred:
            applied += 2 * working
        peak = max(peak, copies + updates + applied)
    # Norms, verdicts and factors: some numbers for every parameter and block.
    numbers = sum(len(plan.names) + len(plan.specs) for plan in plans)
    return peak + _NUMBERS_BYTES * numbers


def _coupled(group: dict[str, Any]) -> bool:
    decoupled = group["decoupled_weight_decay"] or owns_weight_decay(group["grafting"])
    return bool(group["weight_decay"]) and not decoupled


def _stacks(group: dict[str, Any], plan: GroupPlan) -> tuple[int, int]:
    """Most bytes while a stack of this rank is accumulated, and while it is preconditioned."""
    converted = any(p.element_size() > 4 for p in group["params"])
    blends = group["grafting"].blend_steps > 0
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
        grafted = gathered + 2 * size + max(rearranged, size if blends else 0)
        preconditioning = max(preconditioning, product, size + gathering, grafted)
    return accumulating, preconditioning
