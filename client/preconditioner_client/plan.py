"""What the shapes of a parameter group decide once: its blocks, its stacks, and what the service is told."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from preconditioner_client.blocks import Partition, partition
from preconditioner_client.config import BlockingConfig, RootConfig, StatisticsConfig
from preconditioner_client.exchange import BlockSpec
from preconditioner_client.stack import BlockStack, Member


@dataclass(frozen=True, kw_only=True)
class GroupSettings:
    """What a group's blocks are made with."""

    blocking: BlockingConfig
    statistics: StatisticsConfig
    root: RootConfig


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


@dataclass(slots=True)
class GroupPlan:
    """Blocks of one parameter group.

    Attributes:
        settings: as they were when the group was planned.
        names: of the parameters, for messages.
        partitions: of the parameters.
        stacks: of all blocks, grouped by shape, device and preconditioned dimensions.
        specs: of all blocks, in the order of the stacks' rows.
        rows: for each parameter and each block of its partition, ``(stack, row)``.
    """

    settings: GroupSettings
    names: list[str]
    partitions: list[Partition]
    stacks: list[StackPlan]
    specs: list[BlockSpec]
    rows: list[list[tuple[StackPlan, int]]]


def plan_group(
    settings: GroupSettings, parameters: Sequence[torch.Tensor], names: Sequence[str], first_block: int
) -> GroupPlan:
    """Cut the parameters of a group and stack equal blocks.

    Args:
        settings: of the group.
        parameters: of the group, where they will stay.
        names: one for each parameter.
        first_block: index in the session's blocks that the group's first block gets.
    """
    root = settings.root
    partitions = [partition(tuple(p.shape), settings.blocking) for p in parameters]

    kinds: dict[tuple[Any, ...], list[Member]] = defaultdict(list)
    for index, (parameter, cut) in enumerate(zip(parameters, partitions, strict=True)):
        for number, place in enumerate(cut.blocks):
            kind = (place.shape, cut.preconditioned, parameter.device)
            kinds[kind].append(Member(index, number, cut.merged, place))

    plan = GroupPlan(settings, list(names), partitions, [], [], [[] for _ in parameters])
    for (_, preconditioned, device), members in kinds.items():
        stack = BlockStack(members, preconditioned, settings.statistics, device)
        entry = StackPlan(stack, first_block + len(plan.specs))
        plan.stacks.append(entry)
        order = root.root_order(len(preconditioned))
        for row, member in enumerate(members):
            plan.specs.append(
                BlockSpec(
                    name=_label(names[member.parameter], partitions[member.parameter], member),
                    sides=stack.sides,
                    root_orders=(order,) * len(stack.sides),
                    ridge=root.ridge,
                )
            )
            plan.rows[member.parameter].append((entry, row))
    for rows in plan.rows:
        rows.sort(key=lambda entry: entry[0].stack.members[entry[1]].number)
    return plan


def _label(name: str, cut: Partition, member: Member) -> str:
    label = name if len(cut.blocks) == 1 else name + member.place.label()
    return label[-500:]
