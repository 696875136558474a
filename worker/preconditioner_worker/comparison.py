"""Arithmetic of a comparison: steps and wall time to a common target, and what the steps cost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import inf, isfinite
from pathlib import Path
from statistics import median, stdev

import numpy as np
from pydantic import BaseModel, ConfigDict
from rich import box
from rich.table import Table

from preconditioner_worker.results import (
    Environment,
    EvaluationPoint,
    ResultError,
    RunResult,
    RunSettings,
    differences,
    write_text,
)
from preconditioner_worker.tuning import committed


class StepTime(BaseModel):
    """Milliseconds of a step (forward, backward, optimizer) and of the optimizer alone."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    median: float
    p99: float
    optimizer_median: float
    optimizer_p99: float

    @classmethod
    def of(cls, runs: Sequence[RunResult]) -> StepTime:
        """Over all steps of ``runs``."""
        steps = np.concatenate([run.steps.seconds for run in runs]) * 1e3
        optimizer = np.concatenate([run.steps.optimizer_seconds for run in runs]) * 1e3
        return cls(
            median=round(float(np.median(steps)), 3),
            p99=round(float(np.percentile(steps, 99)), 3),
            optimizer_median=round(float(np.median(optimizer)), 3),
            optimizer_p99=round(float(np.percentile(optimizer, 99)), 3),
        )


class Row(BaseModel):
    """One optimizer of a comparison; with several seeds the medians over them.

    A seed that misses the target counts as infinitely slow: with most seeds missing, so is the median, and
    the fields of the target are None.

    Attributes:
        label: of the runs.
        seeds: how many.
        diverged: how many of them diverged, see :func:`has_diverged`.
        steps: length of a run.
        final_loss: held-out, at the end; infinite for a run that diverged.
        final_loss_deviation: standard deviation over the seeds; None for one, or if one diverged.
        steps_to_target: first evaluated step at or below the target of the same seed.
        seconds_to_target: seconds of training up to there.
        steps_ratio: to the baseline's, seed by seed.
        wall_ratio: to the baseline's, seed by seed.
        steps_ratio_range: the least and the greatest of the seeds; infinite for one that misses the target.
        wall_ratio_range: of the same.
        step_ms: cost of a step.
        tuned: what the hyperparameters rest on, see :func:`tuned`; None in files that are older than it.
    """

    # Seeds that miss the target have infinities; JSON has none, so they travel as strings and come back.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    label: str
    seeds: int
    diverged: int
    steps: int
    final_loss: float
    final_loss_deviation: float | None
    steps_to_target: float | None
    seconds_to_target: float | None
    steps_ratio: float | None
    wall_ratio: float | None
    steps_ratio_range: tuple[float, float]
    wall_ratio_range: tuple[float, float]
    step_ms: StepTime
    tuned: str | None = None


class Comparison(BaseModel):
    """All optimizers against the baseline.

    Attributes:
        baseline: label of the runs whose final held-out loss is the target, seed by seed.
        target_loss: median of the targets over seeds.
        rows: the baseline's first.
        environment: of all runs; None in files that are older than it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    baseline: str
    target_loss: float
    rows: list[Row]
    environment: Environment | None = None

    def row(self, label: str) -> Row:
        """The row of ``label``."""
        return next(row for row in self.rows if row.label == label)

    def save(self, path: Path) -> None:
        """Write as JSON."""
        write_text(path, self.model_dump_json(indent=1) + "\n")


def tuned(run: RunSettings) -> str:
    """What a run's hyperparameters rest on: ``12 trials`` of the committed tuning, ``default`` or ``own``.

    An optimizer that was tuned is at an advantage over one that was not.
    """
    # Where roots come from is no hyperparameter.
    chosen = run.optimizer.model_dump(exclude={"service"})
    tuning = committed(run.workload, run.optimizer.name)
    if tuning is not None and chosen == tuning.best.model_dump(exclude={"service"}):
        return f"{len(tuning.trials)} trials"
    return "default" if chosen == type(run.optimizer)().model_dump(exclude={"service"}) else "own"


def crossing(run: RunResult, target: float) -> EvaluationPoint | None:
    """The first evaluation at or below ``target``."""
    return next((point for point in run.evaluations if point.loss <= target), None)


def has_diverged(run: RunResult) -> bool:
    """Whether a loss was not finite, or the last, on held-out data, is above that of the first batch."""
    return run.diverged or run.final_loss > run.steps.loss[0]


def compare(runs: Iterable[RunResult], baseline: str) -> Comparison:
    """Compare runs; those with the same label are seeds of one optimizer.

    Raises:
        ResultError: a seed has no baseline, the baseline diverged, or runs are of different code or machines.
    """
    groups: dict[str, list[RunResult]] = {baseline: []}
    environment: Environment | None = None
    for run in runs:
        groups.setdefault(run.settings.label, []).append(run)
        environment = environment or run.environment
        if found := differences(environment, run.environment):
            raise ResultError(f"{run.settings.stem} must not be compared with the others: {'; '.join(found)}")
    targets: dict[int, RunResult] = {}
    for run in groups[baseline]:
        if has_diverged(run):
            raise ResultError(f"the baseline {baseline!r} diverged with seed {run.settings.seed}: no target")
        targets[run.settings.seed] = run
    if not targets:
        raise ResultError(f"no run of the baseline {baseline!r}")
    return Comparison(
        baseline=baseline,
        target_loss=median(run.final_loss for run in targets.values()),
        rows=[_row(label, group, targets) for label, group in groups.items()],
        environment=environment,
    )


def _row(label: str, runs: Sequence[RunResult], targets: dict[int, RunResult]) -> Row:
    steps, seconds, step_ratios, wall_ratios = [], [], [], []
    for run in runs:
        seed = run.settings.seed
        if seed not in targets:
            raise ResultError(f"{label!r} ran with seed {seed}, the baseline did not")
        goal = targets[seed].final_loss
        baseline, point = crossing(targets[seed], goal), crossing(run, goal)
        if baseline is None:  # its last evaluation is the target itself
            raise AssertionError("a finished run reaches its own final loss")
        steps.append(inf if point is None else point.step)
        seconds.append(inf if point is None else point.seconds)
        step_ratios.append(steps[-1] / baseline.step)
        wall_ratios.append(seconds[-1] / baseline.seconds)
    losses = [inf if run.diverged else run.final_loss for run in runs]
    return Row(
        label=label,
        seeds=len(runs),
        diverged=sum(map(has_diverged, runs)),
        steps=runs[0].settings.steps,
        final_loss=median(losses),
        final_loss_deviation=stdev(losses) if len(losses) > 1 and isfinite(max(losses)) else None,
        steps_to_target=_median(steps),
        seconds_to_target=_median(seconds),
        steps_ratio=_median(step_ratios),
        wall_ratio=_median(wall_ratios),
        steps_ratio_range=(min(step_ratios), max(step_ratios)),
        wall_ratio_range=(min(wall_ratios), max(wall_ratios)),
        step_ms=StepTime.of(runs),
        tuned=tuned(runs[0].settings),
    )


def _median(values: Sequence[float]) -> float | None:
    middle = float(median(values))
    return None if middle == inf else round(middle, 4)


def _spread(deviation: float | None) -> str:
    return "" if deviation is None else f"\n± {deviation:.2g}"


def _over(seeds: int) -> str:
    return "" if seeds == 1 else f"\nmedians over {seeds} seeds, ± standard deviation"


def _number(loss: float) -> str:
    return f"{loss:.4f}" if loss < 1e4 else f"{loss:.1e}"


def table(comparison: Comparison) -> Table:
    """The comparison for a terminal."""
    seeds = comparison.rows[0].seeds
    target = f"target: {comparison.baseline}'s final held-out loss, {comparison.target_loss:.4f}"
    shown = Table(
        title=f"{target}{_over(seeds)}",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    shown.add_column("", no_wrap=True)
    for column in ("final\nloss", "\nsteps", "steps to\ntarget", "\nratio", "seconds\nto it", "\nratio",
                   "step ms\nmedian", "\np99"):  # fmt: skip
        shown.add_column(column, justify="right", no_wrap=True)
    for row in comparison.rows:
        missed = "diverged" if row.diverged == row.seeds else "never"
        shown.add_row(
            (row.label if row.seeds == seeds else f"{row.label} x {row.seeds}")
            + ("" if row.tuned is None else f"\n{row.tuned}"),
            _number(row.final_loss) + _spread(row.final_loss_deviation),
            str(row.steps),
            missed if row.steps_to_target is None else f"{row.steps_to_target:g}",
            "–" if row.steps_ratio is None else f"{row.steps_ratio:.3f}",
            "–" if row.seconds_to_target is None else f"{row.seconds_to_target:.1f}",
            "–" if row.wall_ratio is None else f"{row.wall_ratio:.3f}",
            f"{row.step_ms.median:.1f}",
            f"{row.step_ms.p99:.1f}",
        )
    return shown
