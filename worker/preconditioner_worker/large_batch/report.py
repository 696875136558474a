"""The report of a study: Markdown, JSON and a picture, from its files alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich import box
from rich.table import Table

from preconditioner_worker.large_batch.analysis import KEPT, Analysis, Row, Spread, analyse
from preconditioner_worker.large_batch.design import (
    BATCH_SIZES,
    BEYOND,
    FACTORS,
    RATES,
    REFERENCE_BATCH,
    interval,
)
from preconditioner_worker.large_batch.pictures import draw
from preconditioner_worker.large_batch.results import GUESSING, Study
from preconditioner_worker.markdown import Cells
from preconditioner_worker.markdown import table as markdown_table
from preconditioner_worker.results import write_text
from preconditioner_worker.staleness.results import write
from preconditioner_worker.workloads.digits_shifted import TRAINING_IMAGES

PICTURE = "loss-against-batch-size.png"
Quantity = Callable[[Row], Spread | None]


def report(folder: Path, output: Path | None = None) -> tuple[Analysis, Path]:
    """Write ``report.md``, ``analysis.json`` and the picture.

    Args:
        folder: of the study.
        output: where to; None: the same folder.

    Returns:
        The analysis and the path of the Markdown.

    Raises:
        ResultError: the folder holds no cells, or cells that do not belong together.
    """
    output = output or folder
    analysis = analyse(Study(folder).cells())
    write(output / "analysis.json", analysis)
    draw(analysis, output / PICTURE)
    return analysis, write_text(output / "report.md", markdown(analysis))


def markdown(analysis: Analysis) -> str:
    """The report as text."""
    lines = ["# Final quality against batch size", ""]
    if analysis.missing:
        lines += [f"**This is a partial run.** It lacks {'; '.join(analysis.missing)}.", ""]
    header = ("optimizer", "batch", "steps", "rate", "rates diverged", "seeds", "seeds diverged", "loss",
              "accuracy (%)", "oldest")  # fmt: skip
    environment = analysis.environment
    lines += [
        *_method(analysis),
        f"{analysis.runs} runs, {analysis.minutes:g} minutes of processor time.",
        "",
        f"![Final held-out loss against batch size]({PICTURE})",
        "",
        "## Held-out loss",
        "",
        *_matrix(analysis, lambda row: row.loss, 1, 4, least=True),
        "## Held-out accuracy (%)",
        "",
        *_matrix(analysis, lambda row: row.accuracy, 100, 2, least=False),
        "The best of each batch size is bold.",
        "",
        "## How far quality is kept",
        "",
        f"The largest batch size up to which mean accuracy is at most {KEPT:.0%} (of all images) below that "
        "of the optimizer's smallest batch, with no run diverged; of the sizes that are there, so that it "
        "may be a larger one where sizes are missing.",
        "",
        *markdown_table(
            ("optimizer", "kept up to", "loss there", "smallest batch", "loss", "largest batch", "loss"),
            [_kept(analysis, analysis.of(optimizer)) for optimizer in analysis.optimizers],
        ),
        "## All cells",
        "",
        "A rate marked with * is the least or the greatest that was tried: one beyond might be better. "
        "*Oldest* is the greatest age of a preconditioner in use, in steps.",
        "",
        *markdown_table(header, [_row(row) for row in analysis.rows]),
        f"Code {environment.code}, torch {environment.torch}, NumPy {environment.numpy}, {environment.cpu}.",
        "",
    ]
    return "\n".join(lines)


def _method(analysis: Analysis) -> list[str]:
    study = analysis.study
    rules = ", ".join(f"{name} {base:g} (power {power:g})" for name, (base, power) in RATES.items())
    factors = ", ".join(f"{factor:.2g}" for factor in FACTORS)
    intervals = ", ".join(f"{interval(size)} at {size}" for size in BATCH_SIZES)
    return [
        "A miniature of what the articles on K-FAC (arXiv 1811.12019) and LAMB (arXiv 1904.00962) show on "
        "ImageNet and BERT: how large a batch may be, at a fixed number of epochs, until quality suffers.",
        "",
        "Task: scikit-learn's digits; each of the 1437 training images at nine positions (shifted by at most "
        f"one pixel in either direction), {TRAINING_IMAGES} in all; 360 held-out images, not shifted. A "
        f"convolutional network with BatchNorm ({study.channels} channels in its first layer), the same "
        f"number of epochs in every run ({study.epochs}), warm-up over {study.schedule.warmup:.0%} of the "
        "steps, then a cosine. Held-out loss is in nats per image; for an evaluation each BatchNorm is given "
        "mean and variance over every fourth training image, as running averages lag behind in short runs.",
        "",
        f"Every optimizer tries {len(FACTORS)} learning rates at every batch size, with the seed "
        f"{study.tuning_seed}: {factors} times a base rate that grows with a power of the batch size, and at "
        f"{REFERENCE_BATCH} is {rules}. Where the best is the least or the greatest, the next one beyond is "
        f"tried, at most {BEYOND} in all. The rate with the lowest final held-out loss is run "
        "again with other seeds, and what follows is of those: mean ± standard deviation. A run has "
        f"diverged if a loss is not finite or the last is above {GUESSING:.3f}, that of guessing. The images "
        "that choose the rate are those that judge it, as no others are left; one of them is 0.28%.",
        "",
        "Roots of K-FAC and Shampoo are computed in process; a snapshot every N steps is used exactly N "
        f"steps later. N is {intervals}.",
        "",
    ]


def table(analysis: Analysis) -> Table:
    """Final held-out losses for a terminal."""
    shown = Table(title="final held-out loss (nats per image), by batch size", box=box.SIMPLE)
    shown.add_column("", no_wrap=True)
    for size in analysis.batch_sizes:
        shown.add_column(str(size), justify="right")
    for optimizer in analysis.optimizers:
        rows = (analysis.row(optimizer, size) for size in analysis.batch_sizes)
        shown.add_row(optimizer, *(_entry(row, lambda row: row.loss, 1, 4) for row in rows))
    return shown


def _matrix(analysis: Analysis, quantity: Quantity, factor: float, digits: int, *, least: bool) -> list[str]:
    columns: list[list[str]] = []
    for size in analysis.batch_sizes:
        rows = [analysis.row(optimizer, size) for optimizer in analysis.optimizers]
        means = [spread.mean for row in rows if row is not None and (spread := quantity(row)) is not None]
        best = (min if least else max)(means, default=None)
        columns.append([_entry(row, quantity, factor, digits, best) for row in rows])
    names: list[str] = list(analysis.optimizers)
    return markdown_table(
        ("optimizer", *map(str, analysis.batch_sizes)), list(zip(names, *columns, strict=True))
    )


def _entry(row: Row | None, quantity: Quantity, factor: float, digits: int, best: float | None = None) -> str:
    if row is None:
        return ""
    spread = quantity(row)
    if spread is None:
        return "diverged" if _all_diverged(row) else ""
    text = _spread(spread, factor, digits)
    text = f"**{text}**" if spread.mean == best else text
    return text + (f" ({row.diverged} of {row.seeds} diverged)" if row.diverged else "")


def _all_diverged(row: Row) -> bool:
    return 0 < row.seeds == row.diverged or row.rates_diverged == len(FACTORS) + BEYOND


def _spread(spread: Spread | None, factor: float, digits: int) -> str:
    if spread is None:
        return "–"
    deviation = "" if spread.deviation is None else f" ± {factor * spread.deviation:.{digits}f}"
    return f"{factor * spread.mean:.{digits}f}{deviation}"


def _kept(analysis: Analysis, rows: list[Row]) -> Cells:
    kept = analysis.kept_up_to(rows[0].optimizer)
    there = next((row for row in rows if row.batch_size == kept), None)
    return (
        rows[0].optimizer,
        "–" if kept is None else str(kept),
        "–" if there is None else _spread(there.loss, 1, 4),
        str(rows[0].batch_size),
        _spread(rows[0].loss, 1, 4),
        str(rows[-1].batch_size),
        _spread(rows[-1].loss, 1, 4),
    )


def _row(row: Row) -> Cells:
    return (
        row.optimizer,
        str(row.batch_size),
        str(row.steps),
        "–" if row.lr is None else f"{row.lr:g}{'*' if row.at_edge else ''}",
        f"{row.rates_diverged} of {row.rates}",
        str(row.seeds),
        str(row.diverged),
        _spread(row.loss, 1, 4),
        _spread(row.accuracy, 100, 2),
        "" if row.oldest is None else str(row.oldest),
    )
