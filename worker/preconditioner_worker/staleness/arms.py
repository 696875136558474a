"""The arms of the study: when a snapshot is taken, and how many steps later it is used.

==========  ==============  ============  ====================  ===========================
arm         snapshot every  used after    age at a step         stands for
==========  ==============  ============  ====================  ===========================
``P(N)``    N               0 steps       0 to N - 1            synchronous, refreshed every N
``L(D)``    10              D steps       D to D + 9            latency alone
``A(N)``    N               N steps       N to 2 N - 1          the published system
==========  ==============  ============  ====================  ===========================

In the published system (arXiv 2002.09018) a snapshot taken at step jN is used from step (j + 1) N on, while
the next one is being computed. Statistics of step t are in the snapshot of step t.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from preconditioner_client import StalenessConfig
from preconditioner_client.config import Adoption

PUBLISHED_N = (1, 10, 50, 100, 200, 400, 800, 1200)
LATENCY_INTERVAL = 10
"""Steps between the snapshots of L(D)."""


class ArmKind(str, enum.Enum):
    """Which of the three schedules."""

    PERIODIC = "P"
    LATENCY = "L"
    PUBLISHED = "A"


@dataclass(frozen=True)
class Arm:
    """One schedule of preconditioners.

    Attributes:
        kind: see the module.
        n: N or D, in steps, >= 1.
    """

    kind: ArmKind
    n: int

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"an arm's N must be >= 1 step, not {self.n}")

    @property
    def interval(self) -> int:
        """Steps between two snapshots."""
        return LATENCY_INTERVAL if self.kind is ArmKind.LATENCY else self.n

    @property
    def delay(self) -> int:
        """Steps from a snapshot to its use."""
        return 0 if self.kind is ArmKind.PERIODIC else self.n

    @property
    def oldest(self) -> int:
        """The greatest age that the schedule reaches."""
        return self.delay + self.interval - 1

    def age(self, step: int) -> int | None:
        """Age of the preconditioner that step ``step`` (from 1) uses; None before the first."""
        snapshot = (step - self.delay) // self.interval * self.interval
        return step - snapshot if snapshot >= self.interval else None

    def staleness(self) -> StalenessConfig:
        """The client's settings for it: all blocks in the same steps, and the schedule's own bound."""
        scheduled = self.delay > 0
        return StalenessConfig(
            refresh_every=self.interval,
            max_staleness=max(self.oldest, self.interval),
            adoption=Adoption.SCHEDULED if scheduled else Adoption.EAGER,
            delay=self.delay if scheduled else None,
            stagger=False,
        )
