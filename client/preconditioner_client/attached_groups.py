"""With what settings each parameter group of somebody else's optimizer is preconditioned, if it is at all."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from dataclasses import dataclass

from preconditioner_client.config import (
    BlockingConfig,
    Grafting,
    GraftingConfig,
    RootConfig,
    StatisticsConfig,
)
from preconditioner_client.options import config
from preconditioner_client.plan import GroupSettings, LeftAlone


@dataclass(frozen=True, kw_only=True)
class GroupConfig:
    """What one parameter group has of its own where :func:`attach` gives settings to all; None: theirs.

    Attributes:
        grafting: what length a preconditioned block is given.
        statistics: how the Kronecker statistics are accumulated.
        blocking: how parameters are cut.
        root: ridge and exponent.
    """

    grafting: GraftingConfig | None = None
    statistics: StatisticsConfig | None = None
    blocking: BlockingConfig | None = None
    root: RootConfig | None = None

    def __post_init__(self) -> None:
        config("grafting", self.grafting, GraftingConfig())
        config("statistics", self.statistics, StatisticsConfig())
        config("blocking", self.blocking, BlockingConfig())
        config("root", self.root, RootConfig())


@dataclass(frozen=True, kw_only=True)
class AttachedGroup:
    """The settings of one group.

    Attributes:
        grafting: the diagonal method.
        blocks: what its blocks are made with; :class:`LeftAlone` if it has none on purpose.
    """

    grafting: GraftingConfig
    blocks: GroupSettings

    @property
    def left_alone(self) -> bool:
        """Whether its gradients are neither preconditioned nor grafted."""
        return isinstance(self.blocks, LeftAlone)


_LEFT_ALONE = AttachedGroup(grafting=GraftingConfig(method=Grafting.NONE), blocks=LeftAlone())


class AttachedGroups:
    """The settings of all groups by their number, those included that are yet to come.

    Args:
        common: of groups that have none of their own.
        groups: by number in ``param_groups`` what differs, or None for a group that is left alone.

    Raises:
        ValueError: a number or a value that is none.
    """

    def __init__(self, common: AttachedGroup, groups: Mapping[int, GroupConfig | None] | None) -> None:
        self._common = common
        if groups is not None and not isinstance(groups, Mapping):
            raise ValueError(
                f"groups must map numbers of parameter groups to a GroupConfig or None, not {groups!r}: "
                f"groups={{1: GroupConfig(...), 2: None}}"
            )
        self._own = {_number(number): self._of(number, own) for number, own in (groups or {}).items()}

    def __getitem__(self, number: int) -> AttachedGroup:
        return self._own.get(number, self._common)

    def _of(self, number: int, own: object) -> AttachedGroup:
        if own is None:
            return _LEFT_ALONE
        if not isinstance(own, GroupConfig):
            raise ValueError(
                f"groups[{number}] must be a GroupConfig, or None to leave the group alone, not {own!r}"
            )
        common = self._common.blocks
        return AttachedGroup(
            grafting=config("grafting", own.grafting, self._common.grafting),
            blocks=GroupSettings(
                blocking=config("blocking", own.blocking, common.blocking),
                statistics=config("statistics", own.statistics, common.statistics),
                root=config("root", own.root, common.root),
            ),
        )


def _number(number: object) -> int:
    """Of a group. True is no number here, as it would be group 1."""
    if isinstance(number, bool) or not isinstance(number, numbers.Integral) or number < 0:
        raise ValueError(
            f"groups must name parameter groups by their number in param_groups, 0 for the first, not by "
            f"{number!r}"
        )
    return int(number)
