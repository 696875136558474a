"""Pictures of a study, from its files alone: the same files give the same bytes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from preconditioner_worker.plots import COLOURS
from preconditioner_worker.staleness.analysis import Analysis, Part, Row
from preconditioner_worker.staleness.results import StudyRun

AGE_BINS = 25
NAMES = {
    "diagonal": "grafted diagonal",
    "frozen": "first one frozen",
    "random": "random directions",
    "late": "fresh, but late",
    "adamw": "AdamW without decay",
    "adagrad": "AdaGrad",
}
CONTROL_LOOKS = {
    "diagonal": ("#000000", "--"),
    "frozen": ("#D55E00", "--"),
    "random": ("#CC79A7", "-."),
    "late": ("#E69F00", ":"),
    "adamw": ("#56B4E9", "-."),
    "adagrad": ("0.5", ":"),
}


def draw_all(analysis: Analysis, runs: Sequence[StudyRun], folder: Path) -> list[Path]:
    """Draw every picture into ``folder``; returns their paths."""
    paths = []
    for part in analysis.parts:
        own = [run for run in runs if _belongs(run, part)]
        stem = f"{part.kind.value}-{part.statistics}-{'grafted' if part.grafting else 'ungrafted'}"
        paths += [
            _draw(folder / f"{stem}-loss.png", partial(_loss_against_n, analysis=analysis, part=part)),
            _draw(folder / f"{stem}-curves.png", partial(_curves, analysis=analysis, part=part, runs=runs)),
            _draw(folder / f"{stem}-ages.png", partial(_ages, runs=own)),
            _draw(folder / f"{stem}-drift.png", partial(_drift, runs=own)),
        ]
    return paths


def _draw(path: Path, draw: Callable[[Figure], None]) -> Path:
    with plt.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure = plt.figure(figsize=(8.5, 5.2))
        draw(figure)
        figure.tight_layout()
        path.parent.mkdir(parents=True, exist_ok=True)
        # Without the version of matplotlib, which would be all that differs between two of them.
        figure.savefig(path, dpi=110, metadata={"Software": None})
        plt.close(figure)
    return path


def _belongs(run: StudyRun, part: Part) -> bool:
    spec = run.spec
    return (spec.method, spec.statistics, spec.grafting) == (part.kind.value, part.statistics, part.grafting)


def _loss_against_n(figure: Figure, analysis: Analysis, part: Part) -> None:
    """Final loss minus that of N = 1, with 90% intervals, the zone of equivalence and the controls."""
    axis = figure.subplots()
    rows = [row for row in part.rows if row.difference is not None and np.isfinite(row.difference)]
    if rows:
        middle = np.array([row.difference for row in rows], dtype=float)
        low = np.array([row.low for row in rows], dtype=float)
        high = np.array([row.high for row in rows], dtype=float)
        spread = np.where(np.isfinite([middle - low, high - middle]), [middle - low, high - middle], 0.0)
        axis.errorbar([row.n or 0 for row in rows], middle, yerr=spread, fmt="o", color=COLOURS[2], capsize=5,
                      label=f"{part.kind.value}(N) - {part.kind.value}(1), 90% interval")  # fmt: skip
    axis.axhspan(
        -part.margin,
        part.margin,
        color=COLOURS[3],
        alpha=0.18,
        label=f"margin ±{part.margin:.{part.decimals}f}",
    )
    axis.axhline(0, color="0.4", linewidth=1)
    one = next(row for row in part.rows if row.n == 1)
    controls = [row for row in (*part.controls, *analysis.optimizers) if np.isfinite(row.final_loss)]
    for row in controls:
        difference = row.final_loss - one.final_loss if row.difference is None else row.difference
        colour, style = CONTROL_LOOKS[row.method]
        axis.axhline(difference, color=colour, linestyle=style, label=NAMES[row.method])
    axis.set_xscale("symlog", linthresh=1)
    ticks = [row.n for row in part.rows if row.n is not None]
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.set_xticks([], minor=True)
    axis.set_xlim(left=0.8)
    axis.set(xlabel="N (steps)", ylabel=f"difference of {analysis.metric}")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=9)


def _curves(figure: Figure, analysis: Analysis, part: Part, runs: Sequence[StudyRun]) -> None:
    """Held-out loss against steps, means over the seeds that all have: one seed is easier than another."""
    axis = figure.subplots()
    by_condition: dict[str, list[StudyRun]] = defaultdict(list)
    for run in runs:
        by_condition[run.spec.condition].append(run)
    every = analysis.fingerprint.settings.evaluate_every
    ends = []
    # Beside the controls' colours: later arms darker.
    shades = plt.get_cmap("viridis_r")(np.linspace(0.15, 1.0, len(part.rows)))
    arms = [(to_hex(shade), "-") for shade in shades]
    shown: list[Row] = [*part.rows, *part.controls, *analysis.optimizers]
    seeds = [{run.spec.seed for run in by_condition[row.condition]} for row in shown]
    common = set.intersection(*seeds)
    averaged = common or set.union(*seeds)
    names = ", ".join(map(str, sorted(common)))
    axis.set_title(f"means over the seeds {names}" if common else "means over different seeds")
    for row in shown:
        whole = [
            run.held_out_loss
            for run in by_condition[row.condition]
            if run.spec.seed in averaged and not run.diverged
        ]
        if not whole:
            continue
        mean = np.mean(np.array(whole), axis=0)
        steps = np.minimum(np.arange(len(mean)) * every, analysis.fingerprint.settings.steps)
        own = row.method == part.kind.value
        name = f"{part.kind.value}({row.n})" if own else NAMES[row.method]
        colour, style = arms.pop(0) if own else CONTROL_LOOKS[row.method]
        axis.plot(steps, mean, style, color=colour, linewidth=1.8 if own else 1.3, label=name)
        ends += [mean[-1], mean[len(mean) // 8]]
    if ends:
        low, high = min(ends), max(ends)
        axis.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    axis.set_xlim(left=0)
    axis.set(xlabel="training steps", ylabel=analysis.metric)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=9)


def _by_n(runs: Sequence[StudyRun]) -> dict[int, list[StudyRun]]:
    found: dict[int, list[StudyRun]] = defaultdict(list)
    for run in runs:
        found[run.spec.n or 0].append(run)
    return dict(sorted(found.items()))


def _ages(figure: Figure, runs: Sequence[StudyRun]) -> None:
    """Histograms of the ages that the optimizer logged, one per N."""
    groups = _by_n(runs)
    axes = figure.subplots(1, len(groups), squeeze=False)[0]
    for axis, (n, of_n) in zip(axes, groups.items(), strict=True):
        ages = np.array([age for run in of_n for age in run.ages])
        counts = np.array([count for run in of_n for count in run.ages.values()])
        if ages.size:
            # Equal numbers of whole steps, or bins would differ by their widths alone.
            width = math.ceil((np.ptp(ages) + 1) / AGE_BINS)
            bins = np.arange(ages.min(), ages.max() + width + 1, width) - 0.5
            axis.hist(ages, bins=bins, weights=counts / counts.sum(), color=COLOURS[2])
        axis.set(title=f"N = {n}", xlabel="age (steps)")
        axis.xaxis.get_major_locator().set_params(nbins=3, integer=True)
    axes[0].set_ylabel("share of the steps with a preconditioner")


def _drift(figure: Figure, runs: Sequence[StudyRun]) -> None:
    """Relative distance from fresh preconditioners against age, and against the share of training done."""
    left, right = figure.subplots(1, 2)
    for number, (n, of_n) in enumerate(_by_n(runs).items()):
        colour = COLOURS[number % len(COLOURS)]
        points = [(d.age, d.median, d.step / run.steps) for run in of_n for d in run.drift if d.median > 0]
        if points:
            ages, drifts, shares = zip(*points, strict=True)
            _dots(left, ages, drifts, colour, f"N = {n}")
            _dots(right, shares, drifts, colour, f"N = {n}")
    left.set(
        xlabel="age (steps)", xscale="log", yscale="log", ylabel=r"$\|P_{stale}-P_{fresh}\|/\|P_{fresh}\|$"
    )
    right.set(xlabel="share of training", yscale="log")
    for axis in (left, right):
        axis.grid(alpha=0.25)
        if axis.has_data():
            axis.legend(frameon=False, fontsize=9)


def _dots(axis: Axes, x: Sequence[float], y: Sequence[float], colour: str, label: str) -> None:
    axis.plot(x, y, ".", color=colour, markersize=3, alpha=0.6, label=label)
