"""Pictures of runs: held-out loss against steps and against wall time, and the age of preconditioners."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from preconditioner_worker.comparison import Comparison, crossing
from preconditioner_worker.results import EvaluationPoint, RunResult

# Okabe and Ito's colours, told apart with any common colour blindness; line styles help in grey.
COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLES = ("-", "-", "--", "-.", ":")

Position = Callable[[EvaluationPoint], float]


def draw(runs: Sequence[RunResult], path: Path, *, comparison: Comparison | None = None) -> Path:
    """Draw ``runs`` into one PNG; those with one label share a colour.

    Args:
        runs: of one workload.
        path: of the picture.
        comparison: marks the target and where it is reached.
    """
    aged = [run for run in runs if any(age is not None for age in run.steps.age)]
    with plt.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(1, 3 if aged else 2, figsize=(16 if aged else 11, 4.8), squeeze=False)
        looks = _looks(runs)
        _losses(axes[0, 0], runs, looks, lambda point: point.step, comparison)
        axes[0, 0].set(xlabel="training steps", ylabel=runs[0].metric)
        _losses(axes[0, 1], runs, looks, lambda point: point.seconds, comparison)
        axes[0, 1].set(xlabel="wall time of training (s)", ylabel=runs[0].metric)
        if aged:
            _ages(axes[0, 2], aged, looks)
        for axis in axes[0]:
            axis.grid(alpha=0.25)
            axis.legend(frameon=False, loc="upper right")
        figure.tight_layout()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
        plt.close(figure)
    return path


def _looks(runs: Sequence[RunResult]) -> dict[str, tuple[str, str]]:
    labels = dict.fromkeys(run.settings.label for run in runs)
    return {label: (COLOURS[i % len(COLOURS)], STYLES[i % len(STYLES)]) for i, label in enumerate(labels)}


def _losses(
    axis: Axes,
    runs: Sequence[RunResult],
    looks: dict[str, tuple[str, str]],
    position: Position,
    comparison: Comparison | None,
) -> None:
    named: set[str] = set()
    finite: list[float] = []
    for run in runs:
        label = run.settings.label
        colour, style = looks[label]
        points = run.evaluations
        losses = [point.loss for point in points]
        finite += [loss for loss in losses if np.isfinite(loss)]
        axis.plot(
            [position(point) for point in points],
            losses,
            style,
            color=colour,
            linewidth=2,
            label=None if label in named else label + (" (diverged)" if run.diverged else ""),
        )
        named.add(label)
        reached = None if comparison is None else crossing(run, comparison.target_loss)
        if reached is not None and run.settings.seed == runs[0].settings.seed:
            x = position(reached)
            axis.plot([x], [reached.loss], "o", color=colour, markersize=8)
            axis.annotate(
                f"{x:.1f}" if x < 10 else f"{x:,.0f}",
                (x, reached.loss),
                xytext=(0, -18),
                textcoords="offset points",
                color=colour,
                ha="center",
            )
    if comparison is not None:
        axis.axhline(comparison.target_loss, color="0.45", linewidth=1, linestyle=(0, (4, 3)), label="target")
    if finite:
        # The first evaluations tower over everything that matters.
        low, high = min(finite), float(np.quantile(finite, 0.93))
        margin = 0.08 * (high - low) + 1e-9
        axis.set_ylim(low - 2 * margin, high + margin)
    axis.set_xlim(left=0)


def _ages(axis: Axes, runs: Sequence[RunResult], looks: dict[str, tuple[str, str]]) -> None:
    named: set[str] = set()
    for run in runs:
        label = run.settings.label
        colour, _ = looks[label]
        ages = [np.nan if age is None else age for age in run.steps.age]
        axis.plot(
            range(1, len(ages) + 1), ages, color=colour, linewidth=1, label=None if label in named else label
        )
        named.add(label)
    axis.set(xlabel="training steps", ylabel="age of the oldest preconditioner in use (steps)")
    axis.set_ylim(bottom=0, top=1.15 * axis.get_ylim()[1])
    axis.set_xlim(left=0)
