"""From cells to rows: means and spread over seeds, how far quality is kept, and what is missing."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev

from preconditioner_worker.large_batch.design import (
    BATCH_SIZES,
    OPTIMIZERS,
    SEEDS,
    OptimizerName,
    Record,
    StudySettings,
    epoch_steps,
)
from preconditioner_worker.large_batch.results import Cell
from preconditioner_worker.results import Environment

KEPT = 0.01
"""How much lower accuracy may be than at the smallest batch: one point in a hundred, or 3.6 images."""


class Spread(Record):
    """Of the seeds that did not diverge.

    Attributes:
        mean: over the seeds.
        deviation: standard deviation; None for one seed.
        least: of the seeds.
        greatest: of the seeds.
    """

    mean: float
    deviation: float | None
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """Of some values; None without any."""
        if not values:
            return None
        deviation = stdev(values) if len(values) > 1 else None
        return cls(mean=mean(values), deviation=deviation, least=min(values), greatest=max(values))


class Row(Record):
    """What came of a cell.

    Attributes:
        optimizer: its name.
        batch_size: images a step.
        steps: of a whole run.
        lr: the best learning rate; None if some are still to be tried, or all diverged.
        at_edge: the best rate is the least or the greatest of all.
        rates: that were tried.
        rates_diverged: how many of them diverged.
        seeds: runs at the best rate.
        diverged: how many of them diverged.
        loss: final, held-out, in nats per image; None if no run is there, or all diverged.
        accuracy: final, held-out, as a share.
        oldest: greatest age of a preconditioner in use, in steps; None where there are none.
    """

    optimizer: OptimizerName
    batch_size: int
    steps: int
    lr: float | None
    at_edge: bool
    rates: int
    rates_diverged: int
    seeds: int
    diverged: int
    loss: Spread | None
    accuracy: Spread | None
    oldest: int | None

    @classmethod
    def of(cls, cell: Cell) -> Row:
        """Of a cell."""
        whole = [run for run in cell.runs if not run.diverged]
        return cls(
            optimizer=cell.optimizer,
            batch_size=cell.batch_size,
            steps=cell.study.epochs * epoch_steps(cell.batch_size),
            lr=cell.best,
            at_edge=cell.at_edge,
            rates=len(cell.tuning),
            rates_diverged=sum(run.diverged for run in cell.tuning),
            seeds=len(cell.runs),
            diverged=len(cell.runs) - len(whole),
            loss=Spread.of([run.final_loss for run in whole]),
            accuracy=Spread.of([run.accuracy for run in whole]),
            oldest=max((run.oldest for run in whole if run.oldest is not None), default=None),
        )


class Analysis(Record):
    """All that the report says.

    Attributes:
        study: settings of all runs.
        environment: where and by which code they were made.
        runs: how many there are, tuning included.
        minutes: of processor time in all runs.
        rows: by optimizer in the design's order, and by batch size.
        missing: of the full design, as text.
    """

    study: StudySettings
    environment: Environment
    runs: int
    minutes: float
    rows: tuple[Row, ...]
    missing: tuple[str, ...]

    @property
    def optimizers(self) -> list[OptimizerName]:
        """Those with rows."""
        return list(dict.fromkeys(row.optimizer for row in self.rows))

    @property
    def batch_sizes(self) -> list[int]:
        """Those with rows, in order."""
        return sorted({row.batch_size for row in self.rows})

    def of(self, optimizer: OptimizerName) -> list[Row]:
        """The rows of an optimizer, by batch size."""
        return [row for row in self.rows if row.optimizer == optimizer]

    def row(self, optimizer: OptimizerName, batch_size: int) -> Row | None:
        """One row; None if it is missing."""
        return next((row for row in self.of(optimizer) if row.batch_size == batch_size), None)

    def kept_up_to(self, optimizer: OptimizerName) -> int | None:
        """The largest batch size up to which accuracy falls by at most :data:`KEPT`.

        Against the optimizer's smallest batch, means over seeds; None if nothing is there to compare, or if
        some run up to there diverged.
        """
        kept, first = None, None
        for row in self.of(optimizer):
            if row.accuracy is None or row.diverged:
                break
            first = row.accuracy.mean if first is None else first
            if row.accuracy.mean < first - KEPT:
                break
            kept = row.batch_size
        return kept


def analyse(cells: Sequence[Cell]) -> Analysis:
    """Analyse the cells of one study; there is at least one."""
    ordered = sorted(cells, key=lambda cell: (OPTIMIZERS.index(cell.optimizer), cell.batch_size))
    every = [run for cell in ordered for run in (*cell.tuning, *cell.runs)]
    return Analysis(
        study=ordered[0].study,
        environment=ordered[0].environment,
        runs=len(every),
        minutes=round(sum(run.seconds for run in every) / 60, 1),
        rows=tuple(Row.of(cell) for cell in ordered),
        missing=tuple(_missing(ordered)),
    )


def _missing(cells: Sequence[Cell]) -> list[str]:
    found = {(cell.optimizer, cell.batch_size): cell for cell in cells}
    lacking = []
    epochs, wanted = cells[0].study.epochs, StudySettings().epochs
    if epochs < wanted:
        lacking.append(f"{wanted - epochs} of {wanted} epochs")
    for optimizer in OPTIMIZERS:
        absent = [str(size) for size in BATCH_SIZES if (optimizer, size) not in found]
        if absent:
            at = "" if len(absent) == len(BATCH_SIZES) else f" at {', '.join(absent)}"
            lacking.append(f"{optimizer}{at}")
    for (optimizer, size), cell in found.items():
        rates, seeds = len(cell.rates) - len(cell.tuning), len(SEEDS) - len(cell.runs)
        if rates > 0:
            lacking.append(f"{rates} of {len(cell.rates)} rates and all seeds of {optimizer} at {size}")
        elif cell.next_rate is not None:
            lacking.append(f"rates beyond the grid and all seeds of {optimizer} at {size}")
        elif cell.best is not None and seeds > 0:
            lacking.append(f"{seeds} of {len(SEEDS)} seeds of {optimizer} at {size}")
    return lacking
