"""What the shapes of a parameter group decide once: its blocks, its stacks, and what the service is told."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from preconditioner_client.averaging import GRAFTED, PRECONDITIONED, order_of
from preconditioner_client.blocks import Partition, partition
from preconditioner_client.config import BlockingConfig, RootConfig, StatisticsConfig
from preconditioner_client.distribution import Ranks
from preconditioner_client.exchange import BlockSpec
from preconditioner_client.stack import BlockStack, Member


@dataclass(frozen=True, kw_only=True)
class GroupSettings:
    """What a group's blocks are made with.

    Attributes:
        blocking: how parameters are cut.
        statistics: how they are accumulated.
        root: ridge and exponent.
        momentum_of: what momentum averages, see :mod:`preconditioner_client.averaging`.
    """

    blocking: BlockingConfig
    statistics: StatisticsConfig
    root: RootConfig
    momentum_of: str = GRAFTED

    @property
    def averages(self) -> bool:
        """Whether preconditioned gradients are averaged, block by block."""
        return self.momentum_of == PRECONDITIONED

    @staticmethod
    def of(group: dict[str, Any]) -> GroupSettings:
        """Those of a parameter group that has them beside its numbers."""
        return GroupSettings(
            blocking=group["blocking"],
            statistics=group["statistics"],
            root=group["root"],
            momentum_of=order_of(group),
        )

    def cut(self, index: int, shape: tuple[int, ...], rows: tuple[int, int] | None) -> Partition:
        """How a parameter is cut, see :func:`partition`; ``index`` is its position in the group."""
        return partition(shape, self.blocking, rows)

    def stack(
        self, members: Sequence[Member], preconditioned: tuple[int, ...], device: torch.device
    ) -> BlockStack:
        """What keeps blocks of one shape."""
        return BlockStack(members, preconditioned, self.statistics, device, self.averages)


def check_kept_settings(group: dict[str, Any], planned: GroupSettings, number: int) -> None:
    """Refuse settings that the blocks of a group were not made with, since nothing would come of them.

    Args:
        group: as it is now.
        planned: what its blocks were made with.
        number: of the group.

    Raises:
        ValueError: one was changed since; names it.
    """
    for key in ("blocking", "statistics", "root"):
        made_with = getattr(planned, key)
        if group[key] is not made_with and group[key] != made_with:
            raise ValueError(
                f"{key} of group {number} became {group[key]!r} after its blocks were made with "
                f"{made_with!r}: set it back, or make a new optimizer with it"
            )


@dataclass(frozen=True, kw_only=True, repr=False)
class LeftAlone(GroupSettings):
    """Of a group that is not preconditioned: its parameters have names, and no blocks."""

    blocking: BlockingConfig = field(default_factory=BlockingConfig)
    statistics: StatisticsConfig = field(default_factory=StatisticsConfig)
    root: RootConfig = field(default_factory=RootConfig)

    def cut(self, index: int, shape: tuple[int, ...], rows: tuple[int, int] | None) -> Partition:
        """No blocks, whatever the shape."""
        return Partition(shape, (), ())

    def __repr__(self) -> str:
        # As ranks that differ in it tell each other.
        return "left alone"


@dataclass(slots=True)
class StackPlan:
    """A stack and where its rows stand among all blocks of the optimizer.

    Attributes:
        stack: statistics and preconditioners.
        first: index of row 0 in the session's blocks; the others follow.
        every_row: all rows, for the usual step in which every parameter has a gradient.
    """

    stack: BlockStack
    first: int
    every_row: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.every_row = tuple(range(len(self.stack)))

    def rows_with(self, tensors: Sequence[torch.Tensor | None]) -> tuple[int, ...]:
        """The rows whose parameter has a tensor in the list."""
        if all(tensor is not None for tensor in tensors):
            return self.every_row
        members = self.stack.members
        return tuple(row for row in self.every_row if tensors[members[row].parameter] is not None)


@dataclass(frozen=True, slots=True)
class PlannedBlock:
    """One block of a group, whoever holds it.

    Attributes:
        member: parameter and place; the place is one in the rows that the block's shard holds.
        key: the slice of the whole merged parameter, as in ``0:512,512:1024``; names the block within its
            parameter whatever the number of ranks.
        preconditioned: the merged dimensions that have a preconditioner.
        shard: that holds the block's parameter.
        replica: of this shard, the one that owns the block.
    """

    member: Member
    key: str
    preconditioned: tuple[int, ...]
    shard: int
    replica: int

    @property
    def sides(self) -> tuple[int, ...]:
        """Lengths of the preconditioned sides."""
        return tuple(self.member.place.shape[dim] for dim in self.preconditioned)


@dataclass(slots=True)
class GroupPlan:
    """Blocks of one parameter group.

    Attributes:
        settings: as they were when the group was planned.
        names: of the parameters, for messages.
        blocks: of all ranks, in the same order on all of them.
        stacks: of this rank's blocks, grouped by shape, device and preconditioned dimensions.
        specs: of this rank's blocks, in the order of the stacks' rows.
        own: positions in ``blocks`` of this rank's blocks, in the order of the stacks' rows.
        rows: for each parameter the blocks of this rank, in the order of their slices.
        keys: for each parameter the keys of its blocks on all ranks.
        shards: over how many ranks the rows of the parameters are divided.
    """

    settings: GroupSettings
    names: list[str]
    blocks: list[PlannedBlock]
    stacks: list[StackPlan]
    specs: list[BlockSpec]
    own: list[int]
    rows: list[list[PlannedRow]]
    keys: list[set[str]]
    shards: int

    def snapshot_costs(self) -> list[float]:
        """Values in a snapshot of each of ``blocks``."""
        return [sum(n * (n + 1) / 2 for n in block.sides) for block in self.blocks]


@dataclass(frozen=True, slots=True)
class PlannedRow:
    """Where a block of this rank is kept: its key in the parameter, its stack, its row there."""

    key: str
    entry: StackPlan
    row: int

    @property
    def block(self) -> int:
        """Index in this rank's session."""
        return self.entry.first + self.row


def plan_group(
    settings: GroupSettings,
    parameters: Sequence[torch.Tensor],
    names: Sequence[str],
    first_block: int = 0,
    ranks: Ranks | None = None,
    loads: Loads | None = None,
) -> GroupPlan:
    """Cut the parameters of a group, give every block to one rank, and stack equal ones of this rank.

    Args:
        settings: of the group.
        parameters: of the group, where they will stay.
        names: one for each parameter.
        first_block: index in the session's blocks that the group's first block gets.
        ranks: how the parameters lie over ranks; default: all on this one.
        loads: what earlier groups gave to each rank; this group's is added.
    """
    ranks = ranks or Ranks()
    blocks = _blocks_of(settings, parameters, ranks, loads if loads is not None else Loads())
    plan = GroupPlan(
        settings,
        list(names),
        blocks,
        stacks=[],
        specs=[],
        own=[],
        rows=[[] for _ in parameters],
        keys=[set() for _ in parameters],
        shards=ranks.shards,
    )
    # Per kind the positions of this rank's blocks.
    kinds: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for position, block in enumerate(blocks):
        plan.keys[block.member.parameter].add(block.key)
        if (block.shard, block.replica) == (ranks.shard, ranks.replica):
            device = parameters[block.member.parameter].device
            kinds[(block.member.place.shape, block.preconditioned, device)].append(position)

    for (_, preconditioned, device), positions in kinds.items():
        members = [blocks[position].member for position in positions]
        stack = settings.stack(members, preconditioned, device)
        entry = StackPlan(stack, first_block + len(plan.specs))
        plan.stacks.append(entry)
        plan.own.extend(positions)
        order = settings.root.root_order(len(preconditioned))
        for row, (position, member) in enumerate(zip(positions, members, strict=True)):
            key = blocks[position].key
            name = names[member.parameter]
            plan.specs.append(
                BlockSpec(
                    name=(name if len(plan.keys[member.parameter]) == 1 else f"{name}[{key}]")[-500:],
                    sides=stack.sides,
                    root_orders=(order,) * len(stack.sides),
                    ridge=settings.root.ridge,
                )
            )
            plan.rows[member.parameter].append(PlannedRow(key, entry, row))
    for rows in plan.rows:
        rows.sort(key=lambda held: held.entry.stack.members[held.row].number)
    return plan


class Loads:
    """Work given to each replica of each shard so far, so that groups are balanced together."""

    def __init__(self) -> None:
        self._given: dict[tuple[int, int], float] = defaultdict(float)

    def assign(self, shard: int, replicas: int, costs: Sequence[float]) -> list[int]:
        """The owner of each block: the costliest first, each to the replica with the least work.

        Every rank comes to the same answer, since it follows from the costs alone.
        """
        owners = [0] * len(costs)
        for position in sorted(range(len(costs)), key=lambda i: -costs[i]):
            owner = min(range(replicas), key=lambda replica: self._given[shard, replica])
            owners[position] = owner
            self._given[shard, owner] += costs[position]
        return owners


def _blocks_of(
    settings: GroupSettings, parameters: Sequence[torch.Tensor], ranks: Ranks, loads: Loads
) -> list[PlannedBlock]:
    """All blocks of a group, equal ones together, in an order that is the same on every rank."""
    kinds: dict[tuple[Any, ...], list[PlannedBlock]] = defaultdict(list)
    for index, parameter in enumerate(parameters):
        shape = tuple(parameter.shape)
        # Most shards have as many rows as the first, and share their members with it.
        members: dict[tuple[int, ...], list[Member]] = {}
        for shard in range(ranks.shards):
            cut = settings.cut(index, shape, ranks.rows(shape[0], shard) if shape else None)
            if cut.merged not in members:
                members[cut.merged] = [Member(index, n, cut.merged, p) for n, p in enumerate(cut.blocks)]
            for member in members[cut.merged]:
                key = member.place.key(cut.origin)
                block = PlannedBlock(member, key, cut.preconditioned, shard, replica=0)
                kinds[(member.place.shape, cut.preconditioned)].append(block)
    found = [block for of_kind in kinds.values() for block in of_kind]
    of_shards: list[list[int]] = [[] for _ in range(ranks.shards)]
    for position, block in enumerate(found):
        of_shards[block.shard].append(position)
    for shard, positions in enumerate(of_shards):
        # Accumulating and preconditioning multiply each side with the whole block.
        costs = [float(found[i].member.place.numel * sum(found[i].sides)) for i in positions]
        for position, owner in zip(positions, loads.assign(shard, ranks.replicas, costs), strict=True):
            found[position] = replace(found[position], replica=owner)
    return found
