"""Pictures of runs: held-out loss against steps and against wall time, and the age of preconditioners."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from preconditioner_worker.comparison import Comparison
from preconditioner_worker.results import RunResult

# Okabe and Ito's colours, told apart with any common colour blindness; line styles help in grey.
COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLES = ("-", "-", "--", "-.", ":")
FEW = 4
"""Curves up to which a legend has room among them, and the steps to the target beside their marks."""
DECADE = 10.0
"""Ratio of the greatest final loss to the least from which on losses are drawn on a logarithmic axis."""


@dataclass(frozen=True)
class Curve:
    """The runs of one label, over seeds; one that diverged counts as infinite from there on. E evaluations.

    Attributes:
        runs: the seeds.
        steps: of the evaluations, (E,).
        seconds: of training up to these, the median of those seeds that came there, (E,).
        median: of the losses, (E,).
        least: of the losses, (E,).
        greatest: of the losses, (E,).
    """

    runs: Sequence[RunResult]
    steps: NDArray[np.float64]
    seconds: NDArray[np.float64]
    median: NDArray[np.float64]
    least: NDArray[np.float64]
    greatest: NDArray[np.float64]

    @classmethod
    def of(cls, runs: Sequence[RunResult]) -> Curve:
        """Over ``runs`` of one label."""
        # One that diverged has fewer, the last of them at the step where it did.
        grid = [point.step for point in max(runs, key=lambda run: len(run.evaluations)).evaluations]
        losses = np.full((len(runs), len(grid)), np.inf)
        seconds = np.full((len(runs), len(grid)), np.nan)
        for row, run in enumerate(runs):
            for point in run.evaluations:
                if point.step in grid:
                    column = grid.index(point.step)
                    losses[row, column] = point.loss if np.isfinite(point.loss) else np.inf
                    seconds[row, column] = point.seconds
        return cls(
            runs,
            np.array(grid, dtype=np.float64),
            np.nanmedian(seconds, axis=0),
            np.median(losses, axis=0),
            losses.min(axis=0),
            losses.max(axis=0),
        )

    @property
    def name(self) -> str:
        """Label, and how many seeds diverged."""
        label, diverged = self.runs[0].settings.label, sum(run.diverged for run in self.runs)
        if not diverged:
            return label
        return f"{label} (diverged)" if len(self.runs) == 1 else f"{label} ({diverged} diverged)"


def draw(runs: Sequence[RunResult], path: Path, *, comparison: Comparison | None = None) -> Path:
    """Draw ``runs`` into one PNG; of those with one label the median over seeds, and their range.

    Args:
        runs: of one workload.
        path: of the picture.
        comparison: marks the target and where the medians reach it.
    """
    labels = dict.fromkeys(run.settings.label for run in runs)
    curves = [Curve.of([run for run in runs if run.settings.label == label]) for label in labels]
    looks = [(COLOURS[i % len(COLOURS)], STYLES[i % len(STYLES)]) for i in range(len(curves))]
    aged = any(age is not None for run in runs for age in run.steps.age)
    with plt.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(1, 3 if aged else 2, figsize=(16 if aged else 11, 4.8), squeeze=False)
        for axis, by_steps in zip(axes[0], (True, False), strict=False):
            for curve, look in zip(curves, looks, strict=True):
                _loss(axis, curve, look, by_steps, comparison, annotated=len(curves) <= FEW)
            _frame(axis, curves, comparison)
            axis.set(ylabel=runs[0].metric)
        axes[0, 0].set(xlabel="training steps")
        axes[0, 1].set(xlabel="wall time of training (s)")
        if aged:
            _ages(axes[0, 2], curves, looks)
        for axis in axes[0]:
            axis.grid(alpha=0.25)
            if len(curves) <= FEW:
                axis.legend(frameon=False, loc="upper right")
        figure.tight_layout()
        if len(curves) > FEW:
            handles, names = axes[0, 0].get_legend_handles_labels()
            figure.legend(handles, names, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 0.98))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130, bbox_inches="tight")
        plt.close(figure)
    return path


def _loss(
    axis: Axes,
    curve: Curve,
    look: tuple[str, str],
    by_steps: bool,
    comparison: Comparison | None,
    *,
    annotated: bool,
) -> None:
    colour, style = look
    where = curve.steps if by_steps else curve.seconds
    axis.plot(where, _shown(curve.median), style, color=colour, linewidth=2, label=curve.name)
    if len(curve.runs) > 1:
        spread = np.isfinite(curve.greatest)
        axis.fill_between(
            where[spread], curve.least[spread], curve.greatest[spread], color=colour, alpha=0.12, linewidth=0
        )
    reached = np.flatnonzero(curve.median <= (-np.inf if comparison is None else comparison.target_loss))
    if not reached.size:
        return
    x, y = where[reached[0]], curve.median[reached[0]]
    axis.plot([x], [y], "o", color=colour, markersize=8 if annotated else 5)
    if annotated:
        text = f"{x:.1f}" if x < DECADE else f"{x:,.0f}"
        axis.annotate(text, (x, y), xytext=(0, -18), textcoords="offset points", color=colour, ha="center")


def _shown(losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """Infinities as gaps."""
    return np.where(np.isfinite(losses), losses, np.nan)


def _frame(axis: Axes, curves: Sequence[Curve], comparison: Comparison | None) -> None:
    """The target, and limits within which what matters is seen."""
    if comparison is not None:
        axis.axhline(comparison.target_loss, color="0.45", linewidth=1, linestyle=(0, (4, 3)), label="target")
    axis.set_xlim(left=0)
    shown = np.concatenate([curve.median[np.isfinite(curve.median)] for curve in curves])
    if not shown.size:
        return
    # The first evaluations tower over everything that matters.
    low, high = float(shown.min()), float(np.quantile(shown, 0.93))
    ends = [end for end in (float(curve.median[-1]) for curve in curves) if np.isfinite(end)]
    if ends and min(ends) > 0 and max(ends) / min(ends) > DECADE:
        axis.set_yscale("log")
        axis.set_ylim(0.7 * low, 1.3 * high)
        return
    margin = 0.08 * (high - low) + 1e-9
    axis.set_ylim(low - 2 * margin, high + margin)


def _ages(axis: Axes, curves: Sequence[Curve], looks: Sequence[tuple[str, str]]) -> None:
    """Of the first seed of each."""
    for curve, (colour, _) in zip(curves, looks, strict=True):
        ages = [np.nan if age is None else age for age in curve.runs[0].steps.age]
        if not np.isnan(ages).all():
            axis.plot(range(1, len(ages) + 1), ages, color=colour, linewidth=1, label=curve.name)
    axis.set(xlabel="training steps", ylabel="age of the oldest preconditioner in use (steps)")
    axis.set_ylim(bottom=0, top=1.15 * axis.get_ylim()[1])
    axis.set_xlim(left=0)
