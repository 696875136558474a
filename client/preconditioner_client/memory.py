"""How much memory an optimizer takes beside parameters and gradients, from shapes and settings alone.

The formula, in bytes, with e the number of elements that this rank holds of a parameter, w their working
size (4, or 8 for float64), and over the blocks that this rank owns, of sides n:

======================  ==========================================================================
what                    bytes
======================  ==========================================================================
``statistics``          4 n² for every preconditioned side
``preconditioners``     4 n² for every preconditioned side
``moments``             w e for each of: gradient's EMA (``beta1 > 0``), second moment of the grafting
                        method, momentum; and with ``momentum_of="preconditioned"`` 4 times the elements of
                        every block that this rank owns
``triangles``           8 n (n + 1) / 2 for every different n: the indices that snapshots are packed with
``gather_buffers``      (replicas + 1) x c x the values of the largest share of a replica, c the bytes of
                        the communication's dtype, summed over buckets; c x the values of each block that
                        is longer than two equal shares, and so in none
``temporaries``         the largest moment of a step: two to three w e, and three to four times the
                        largest stack of equal blocks; see :func:`_temporaries`
``outbox``              k 4 n (n + 1) / 2 for every side: snapshots, packed; k how many of a block may be
                        under way (1 but for a schedule)
``inbox``               k 4 n² for every side: preconditioners between arrival and adoption
``in_flight``           what the service may have sent without receipt: at most ``credit_bytes``
======================  ==========================================================================

The last three are the host's; on an accelerator preconditioners are there, too, before their adoption, and
snapshots on their way out, which then counts as ``arrivals`` and within ``temporaries``.

What K-FAC takes beside these, and its own ``temporaries``, has :mod:`preconditioner_client.kfac.memory`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from preconditioner_client.config import StalenessConfig
from preconditioner_client.distribution import DistributedConfig, Ranks, is_dtensor
from preconditioner_client.plan import GroupPlan, GroupSettings, LeftAlone, Loads, plan_group
from preconditioner_client.sharing import gather_bytes
from preconditioner_client.step_memory import (
    applying_bytes,
    deferred,
    directions_bytes,
    numbers_bytes,
    stack_bytes,
    working_bytes,
    working_copies,
)
from preconditioner_client.update_rule import state_keys
from preconditioner_protos import packed_length


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes on one rank, see :mod:`preconditioner_client.memory`. All are upper bounds.

    The last four are K-FAC's alone, see :mod:`preconditioner_client.kfac.memory`.
    """

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
    diagonals: int = 0
    compared: int = 0
    factor_buffers: int = 0
    recorded: int = 0

    @property
    def host(self) -> int:
        """What is on the host whatever the parameters' device is."""
        return self.outbox + self.inbox + self.in_flight

    @property
    def persistent(self) -> int:
        """What is on the parameters' device between a step and the next backward pass."""
        return self.device - self.temporaries - self.arrivals - self.recorded

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
    settings: Sequence[GroupSettings],
    staleness: StalenessConfig,
    distributed: str | DistributedConfig,
    replicas: int | None,
    replica: int,
    credit_bytes: int,
) -> MemoryEstimate:
    """The formula, for the parameter groups of a ``Shampoo`` whose parameters all have gradients.

    Args:
        groups: as in ``param_groups``.
        settings: what the groups' blocks are made with.
        staleness: of the optimizer.
        distributed: of the optimizer.
        replicas: see ``Shampoo.estimate_memory``.
        replica: see ``Shampoo.estimate_memory``.
        credit_bytes: see :class:`ServiceConfig`.

    Raises:
        ValueError: see ``Shampoo.estimate_memory``.
    """
    ranks = ranks_as_if(groups, distributed, replicas, replica)
    plans = plan_on_meta(settings, [[p.shape for p in group["params"]] for group in groups], ranks)
    # A verdict on its gradients, which the plans count, is all that there is of a group left alone.
    groups = [
        {**group, "params": []} if isinstance(of_group, LeftAlone) else group
        for group, of_group in zip(groups, settings, strict=True)
    ]
    found = memory_of_blocks(groups, plans, ranks, staleness, credit_bytes)
    return replace(found, temporaries=_temporaries(groups, plans))


def plan_on_meta(
    settings: Sequence[GroupSettings], shapes: Sequence[Sequence[tuple[int, ...]]], ranks: Ranks
) -> list[GroupPlan]:
    """The plans of groups whose parameters have these shapes; they take no memory."""
    loads = Loads()
    plans: list[GroupPlan] = []
    for of_group, shapes_of_group in zip(settings, shapes, strict=True):
        parameters = [torch.empty(shape, device="meta") for shape in shapes_of_group]
        first = sum(len(plan.specs) for plan in plans)
        plans.append(plan_group(of_group, parameters, [""] * len(parameters), first, ranks, loads))
    return plans


def memory_of_blocks(
    groups: Sequence[dict[str, Any]],
    plans: Sequence[GroupPlan],
    ranks: Ranks,
    staleness: StalenessConfig,
    credit_bytes: int,
) -> MemoryEstimate:
    """What follows from blocks and moments alone: all but the temporaries, which are left at 0."""
    sides = [n for plan in plans for spec in plan.specs for n in spec.sides]
    full, packed = 4 * sum(n * n for n in sides), packed_bytes(sides)
    under_way = staleness.snapshots_in_flight
    return MemoryEstimate(
        statistics=full,
        preconditioners=full,
        moments=sum(_moments(group) for group in groups) + sum(_averages(plan) for plan in plans),
        triangles=triangle_bytes(sides),
        gather_buffers=gather_bytes(plans, ranks),
        arrivals=under_way * full if deferred(groups) else 0,
        temporaries=0,
        outbox=under_way * packed,
        inbox=under_way * full,
        in_flight=min(under_way * packed, credit_bytes),
    )


def packed_bytes(sides: Iterable[int]) -> int:
    """Of one packed snapshot with these sides."""
    return 4 * sum(map(packed_length, sides))


def triangle_bytes(sides: Iterable[int]) -> int:
    """Of the indices that these sides are packed with."""
    return 8 * sum(map(packed_length, set(sides)))


def ranks_as_if(
    groups: Sequence[dict[str, Any]], distributed: str | DistributedConfig, replicas: int | None, replica: int
) -> Ranks:
    """How parameters lie over ranks, or would with that many replicas.

    Raises:
        ValueError: see ``Shampoo.estimate_memory``.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
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


def _moments(group: dict[str, Any]) -> int:
    return len(state_keys(group)) * working_bytes(group["params"])


def _averages(plan: GroupPlan) -> int:
    if not plan.settings.averages:
        return 0
    return sum(4 * len(entry.stack) * entry.stack.members[0].place.numel for entry in plan.stacks)


def _temporaries(groups: Sequence[dict[str, Any]], plans: Sequence[GroupPlan]) -> int:
    """The largest moment of a step, beside what stays and what is under way.

    Gradients that are not used as they are (half precision, coupled weight decay, ``maximize``) have a
    working copy through the whole step, and every group that has had its turn has its updates. Group by group
    there are, beside these: while statistics are accumulated, a stack; while directions are found, the
    filtered gradient, the denominators and the directions; while blocks are preconditioned, the filtered
    gradient, the directions, and some copies of a stack; while updates are applied, their converted copies.
    """
    copies = working_copies(groups)
    packed = packed_bytes(n for plan in plans for spec in plan.specs for n in spec.sides)
    peak = copies + (packed if deferred(groups) else 0)
    updates = 0
    for group, plan in zip(groups, plans, strict=True):
        found = directions_bytes(group)
        accumulating, preconditioning = stack_bytes(group, plan)
        peak = max(peak, copies + accumulating)
        having = copies + updates + found.filtered + found.weights + found.updates
        peak = max(peak, having + max(found.denominators, preconditioning))
        updates += found.updates
    peak = max(peak, copies + updates + applying_bytes(groups))
    return peak + numbers_bytes(plans)
