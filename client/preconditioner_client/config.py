"""Settings of the optimizer, grouped by what they govern; each validates itself when it is made."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from preconditioner_client.choice import Choice
from preconditioner_client.options import check_number, check_numbers


class Grafting(str, enum.Enum):
    """The diagonal method that gives a step its length."""

    NONE = "none"
    SGD = "sgd"
    ADAGRAD = "adagrad"
    RMSPROP = "rmsprop"
    ADAM = "adam"
    LARS = "lars"
    LAMB = "lamb"


class Accumulation(str, enum.Enum):
    """How statistics are accumulated over steps."""

    EMA = "ema"
    SUM = "sum"


class RidgeKind(str, enum.Enum):
    """How a spectrum is conditioned before its root."""

    RELATIVE = "relative"
    ABSOLUTE = "absolute"
    TRACE = "trace"
    PSEUDO_INVERSE = "pseudo_inverse"


class Adoption(str, enum.Enum):
    """From which step an arrived preconditioner is used."""

    EAGER = "eager"
    SCHEDULED = "scheduled"


class StalePolicy(str, enum.Enum):
    """What a step does for a block whose preconditioner is older than the bound."""

    WAIT = "wait"
    GRAFT = "graft"
    KEEP = "keep"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class Ridge:
    """What is added to a spectrum before its root.

    Attributes:
        kind: ``relative``: value x largest eigenvalue; ``absolute``: value; ``trace``: value x trace / n;
            ``pseudo_inverse``: nothing is added, and eigenvalues up to value x the largest count as zero, as
            do their roots.
        value: finite and >= 0.
    """

    kind: Choice[RidgeKind, Literal["relative", "absolute", "trace", "pseudo_inverse"]] = Choice(
        RidgeKind.RELATIVE
    )
    value: float = 1e-6

    def __post_init__(self) -> None:
        check_numbers(self)
        _require(
            math.isfinite(self.value) and self.value >= 0,
            f"ridge value must be finite and >= 0, not {self.value}",
        )


@dataclass(frozen=True, kw_only=True)
class GraftingConfig:
    """The diagonal method whose step length every block takes.

    It alone serves where there is no preconditioner.

    Attributes:
        method: ``none`` takes the preconditioned gradient as it is. With statistics as an EMA do so only
            where preconditioners are at most about a hundred steps old: in the study of the worker's
            README the age of older ones alone costs final loss without grafting, and not with it.
        beta2: decay of the second moment, for ``rmsprop`` (torch calls it alpha) and ``adam``.
        epsilon: added to the root of the second moment.
        trust_coefficient: eta of ``lars``.
        blend_steps: over how many steps after its first version a block's direction passes linearly from the
            diagonal to the preconditioned one; 0: at once.
    """

    method: Choice[Grafting, Literal["none", "sgd", "adagrad", "rmsprop", "adam", "lars", "lamb"]] = Choice(
        Grafting.ADAM
    )
    beta2: float = 0.999
    epsilon: float = 1e-8
    trust_coefficient: float = 1e-3
    blend_steps: int = 0

    def __post_init__(self) -> None:
        check_numbers(self)
        _require(0 <= self.beta2 < 1, f"grafting beta2 must be in [0, 1), not {self.beta2}")
        _require(
            self.epsilon >= 0 and math.isfinite(self.epsilon),
            f"grafting epsilon must be finite and >= 0, not {self.epsilon}",
        )
        _require(
            self.trust_coefficient > 0 and math.isfinite(self.trust_coefficient),
            f"grafting trust_coefficient must be finite and > 0, not {self.trust_coefficient}",
        )
        _require(self.blend_steps >= 0, f"blend_steps must be >= 0, not {self.blend_steps}")


@dataclass(frozen=True, kw_only=True)
class StatisticsConfig:
    """The Kronecker statistics ``S <- S + G Gᵀ`` of every side.

    Attributes:
        accumulation: ``sum`` as published in 2020 (arXiv 2002.09018), or ``ema``: ``S <- beta S + (1 - beta)
            G Gᵀ``.
        beta: decay of the EMA.
        bias_correction: divide the EMA by ``1 - beta^t`` before its root.
        every: steps between two accumulations, >= 1.
    """

    accumulation: Choice[Accumulation, Literal["ema", "sum"]] = Choice(Accumulation.EMA)
    beta: float = 0.999
    bias_correction: bool = True
    every: int = 1

    def __post_init__(self) -> None:
        check_numbers(self)
        _require(
            0 <= self.beta < 1,
            f"statistics beta must be in [0, 1), not {self.beta}; for a sum use accumulation='sum'",
        )
        _require(self.every >= 1, f"statistics every must be >= 1 step, not {self.every}")


@dataclass(frozen=True, kw_only=True)
class BlockingConfig:
    """How parameters are cut into blocks.

    Attributes:
        block_size: largest side of a block; longer sides are split.
        merge_dims: merge neighbouring dimensions while their product is at most ``block_size``.
        max_side: a dimension longer than this is neither split nor preconditioned (embeddings, softmax);
            the other sides still are. None: no limit.
    """

    block_size: int = 1024
    merge_dims: bool = True
    max_side: int | None = 8192

    def __post_init__(self) -> None:
        check_numbers(self)
        _require(self.block_size >= 1, f"block_size must be >= 1, not {self.block_size}")
        _require(self.max_side is None or self.max_side >= 1, f"max_side must be >= 1, not {self.max_side}")


@dataclass(frozen=True, kw_only=True)
class RootConfig:
    """Which root is taken.

    Attributes:
        ridge: conditioning of the spectrum.
        exponent: the exponent e in ``S^(-e)``, one for all blocks or by the number k of preconditioned
            sides. Default 1 / (2k) (arXiv 1802.09568).
    """

    ridge: Ridge = field(default_factory=Ridge)
    exponent: float | Mapping[int, float] | None = None

    def __post_init__(self) -> None:
        values = self.exponent.values() if isinstance(self.exponent, Mapping) else [self.exponent]
        for value in values:
            if value is not None:
                check_number("exponent", value)
            _require(
                value is None or (math.isfinite(value) and value > 0),
                f"exponent must be finite and > 0 (it is applied as S^-exponent), not {value}",
            )

    def root_order(self, sides: int) -> float:
        """p in ``S^(-1/p)`` for a block of which ``sides`` sides are preconditioned."""
        exponent = self.exponent.get(sides) if isinstance(self.exponent, Mapping) else self.exponent
        return 2.0 * sides if exponent is None else 1.0 / exponent


@dataclass(frozen=True, kw_only=True)
class StalenessConfig:
    """How fresh preconditioners are kept, and what happens when they are not.

    Age at step t is ``t - s`` for a preconditioner computed from the snapshot after step s.

    Attributes:
        max_staleness: the bound N: a step never waits while the age is at most N, but on a schedule for a
            version that is due.
        refresh_every: steps between snapshots of a block. None: a new one as soon as the last trip is back,
            at most every 10 steps.
        adoption: ``eager``: used from the first step after arrival. ``scheduled``: the version of snapshot
            s is used exactly from step s + delay, so that a run is reproducible bit for bit.
        delay: D of ``scheduled``, in steps.
        policy: beyond the bound, ``wait`` until fresh, ``graft`` (the diagonal step alone) or ``keep`` (use
            the stale one).
        stale_timeout: seconds that one step may wait under ``wait``. Then no step waits again until versions
            arrive; the diagonal step serves meanwhile.
        stagger: spread the blocks' snapshots over the refresh interval instead of taking all in one step.
    """

    max_staleness: int = 200
    refresh_every: int | None = None
    adoption: Choice[Adoption, Literal["eager", "scheduled"]] = Choice(Adoption.EAGER)
    delay: int | None = None
    policy: Choice[StalePolicy, Literal["wait", "graft", "keep"]] = Choice(StalePolicy.WAIT)
    stale_timeout: float = 60.0
    stagger: bool = True

    AUTO_REFRESH: ClassVar[int] = 10

    def __post_init__(self) -> None:
        check_numbers(self)
        _require(self.max_staleness >= 1, f"max_staleness must be >= 1 step, not {self.max_staleness}")
        _require(
            self.refresh_every is None or self.refresh_every >= 1,
            f"refresh_every must be >= 1 step, not {self.refresh_every}",
        )
        _require(
            math.isfinite(self.stale_timeout) and self.stale_timeout >= 0,
            f"stale_timeout must be finite and >= 0 seconds, not {self.stale_timeout}",
        )
        interval = self.interval
        _require(
            self.max_staleness >= interval,
            f"max_staleness {self.max_staleness} is smaller than the refresh interval {interval}: every "
            f"preconditioner would be stale before the next; raise max_staleness or lower refresh_every",
        )
        if self.adoption is Adoption.SCHEDULED:
            _require(self.refresh_every is not None, "adoption='scheduled' needs refresh_every")
            _require(
                self.delay is not None and self.delay >= 1,
                f"adoption='scheduled' needs delay >= 1 step, not {self.delay}",
            )
            oldest = (self.delay or 0) + interval - 1
            _require(
                self.max_staleness >= oldest,
                f"max_staleness {self.max_staleness} is smaller than delay + refresh_every - 1 = {oldest}, "
                f"the age that this schedule reaches by itself",
            )
        else:
            _require(self.delay is None, "delay belongs to adoption='scheduled'")

    @property
    def interval(self) -> int:
        """Least number of steps between two snapshots of a block."""
        return self.AUTO_REFRESH if self.refresh_every is None else self.refresh_every

    @property
    def snapshots_in_flight(self) -> int:
        """How many snapshots of one block may be under way at once without one replacing another."""
        return 1 if self.delay is None else -(-self.delay // self.interval) + 1
