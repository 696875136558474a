"""What a study consists of: its fixed settings, and the runs by their names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from preconditioner_worker.schedule import Schedule
from preconditioner_worker.staleness.arms import Arm, ArmKind

Method: TypeAlias = Literal["P", "L", "A", "diagonal", "frozen", "random", "late", "adamw", "adagrad"]
Statistics: TypeAlias = Literal["sum", "ema"]

CONTROLS: tuple[Method, ...] = ("diagonal", "frozen", "random", "late", "adamw", "adagrad")
RANDOM_INTERVAL = 100
"""Refresh interval of the random control: its directions mean nothing, however fresh they are."""
FIRST = 1
"""Step of the first snapshot of the arms with N = 1, which the control 'frozen' keeps for ever."""


class Record(BaseModel):
    """Part of a file of the study."""

    # Diverged runs hold infinities and NaN; JSON has none, so they travel as strings and come back.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class StudySettings(Record):
    """What all runs of a study have in common; runs with other settings are never mixed with them.

    Attributes:
        task: name of the task.
        steps: length of a run.
        evaluate_every: steps between evaluations on held-out data.
        drift_every: steps between comparisons with fresh preconditioners; odd, so that all ages are met.
        schedule: of the learning rate.
        momentum: mu of ``m <- mu m + (1 - mu) P_0 G P_1``.
        blend_steps: over how many steps after its first version a block passes from the diagonal direction
            to the preconditioned one.
        ema_beta: decay of statistics that are no sum.
    """

    task: str = "text"
    steps: PositiveInt = 12_000
    evaluate_every: PositiveInt = 50
    drift_every: PositiveInt = 97
    schedule: Schedule = Schedule(warmup=0.05)
    momentum: Annotated[float, Field(gt=0, lt=1)] = 0.9
    blend_steps: Annotated[int, Field(ge=0)] = 1000
    ema_beta: Annotated[float, Field(ge=0, lt=1)] = 0.999


class RunSpec(Record):
    """One run.

    Attributes:
        method: an arm, a control or another optimizer.
        n: N or D of an arm; of ``frozen`` the step of the snapshot that is kept, of ``random`` the refresh
            interval; ``late`` has none before step 2 n, and always fresh ones from then on; else None.
        statistics: accumulated as a sum or as an EMA; None where there are none.
        grafting: whether a step has AdaGrad's length; None where there is no Shampoo.
        seed: of weights and batches.
    """

    method: Method
    n: PositiveInt | None = None
    statistics: Statistics | None = None
    grafting: bool | None = None
    seed: Annotated[int, Field(ge=0)]

    @property
    def arm(self) -> Arm | None:
        """The schedule, for the runs that follow one of the arms."""
        if self.method in ("P", "L", "A") and self.n is not None:
            return Arm(ArmKind(self.method), self.n)
        return None

    @property
    def condition(self) -> str:
        """What the run is but for its seed: ``A-1200-sum-grafted``."""
        parts: list[str] = [self.method]
        if self.n is not None:
            parts.append(str(self.n))
        if self.statistics is not None:
            parts.append(self.statistics)
        if self.grafting is not None:
            parts.append("grafted" if self.grafting else "ungrafted")
        return "-".join(parts)

    @property
    def key(self) -> str:
        """Name of its file: ``A-1200-sum-grafted-seed0``."""
        return f"{self.condition}-seed{self.seed}"

    @property
    def tuned_as(self) -> str:
        """The optimizer whose learning rate it takes: every arm has that of Shampoo at N = 1."""
        if self.method in ("adamw", "adagrad", "diagonal"):
            return self.method
        return f"shampoo-{self.statistics}-{'grafted' if self.grafting else 'ungrafted'}"


def arm_runs(
    kinds: Sequence[ArmKind], ns: Sequence[int], statistics: Statistics, grafting: bool, seeds: Sequence[int]
) -> list[RunSpec]:
    """All runs of the arms, seed by seed, N = 1 included: everything is compared with it."""
    return [
        RunSpec(method=kind.value, n=n, statistics=statistics, grafting=grafting, seed=seed)
        for seed in seeds
        for kind in kinds
        for n in sorted({1, *ns})
    ]


def control_runs(
    statistics: Statistics, grafting: bool, seeds: Sequence[int], largest_n: int
) -> list[RunSpec]:
    """All runs of the controls, seed by seed; ``largest_n`` is that of the arms."""
    return [control(method, statistics, grafting, seed, largest_n) for seed in seeds for method in CONTROLS]


def control(method: Method, statistics: Statistics, grafting: bool, seed: int, largest_n: int) -> RunSpec:
    """One run of a control."""
    if method in ("adamw", "adagrad"):
        return RunSpec(method=method, seed=seed)
    if method == "diagonal":
        return RunSpec(method=method, grafting=True, seed=seed)
    n = {"frozen": FIRST, "random": RANDOM_INTERVAL}.get(method, largest_n)
    return RunSpec(method=method, n=n, statistics=statistics, grafting=grafting, seed=seed)
