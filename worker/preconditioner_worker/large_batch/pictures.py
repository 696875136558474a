"""The picture of a study: final loss against batch size. The same analysis gives the same bytes."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FormatStrFormatter, LogLocator

from preconditioner_worker.large_batch.analysis import Analysis, Row
from preconditioner_worker.large_batch.design import OPTIMIZERS
from preconditioner_worker.plots import COLOURS

MARKERS = "osD^vP"


def draw(analysis: Analysis, path: Path) -> Path:
    """Draw a line for every optimizer, the mean over seeds, with a band from the least to the greatest."""
    with plt.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axis = plt.subplots(figsize=(8.5, 5.2))
        for optimizer in analysis.optimizers:
            number = OPTIMIZERS.index(optimizer)
            _line(axis, analysis.of(optimizer), COLOURS[number], MARKERS[number])
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(analysis.batch_sizes, [str(size) for size in analysis.batch_sizes])
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axis.minorticks_off()
        axis.set(
            xlabel=f"batch size (images); {analysis.study.epochs} epochs each",
            ylabel="final held-out loss (nats per image)",
        )
        axis.grid(alpha=0.25)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False)
        figure.tight_layout()
        path.parent.mkdir(parents=True, exist_ok=True)
        # Without the version of matplotlib, which would be all that differs between two of them.
        figure.savefig(path, dpi=110, metadata={"Software": None})
        plt.close(figure)
    return path


def _line(axis: Axes, rows: list[Row], colour: str, marker: str) -> None:
    spreads = [(row, row.loss) for row in rows if row.loss is not None]
    if not spreads:
        return
    sizes = [row.batch_size for row, _ in spreads]
    axis.plot(sizes, [loss.mean for _, loss in spreads], color=colour, marker=marker, label=rows[0].optimizer)
    axis.fill_between(
        sizes,
        [loss.least for _, loss in spreads],
        [loss.greatest for _, loss in spreads],
        color=colour,
        alpha=0.15,
        linewidth=0,
    )
