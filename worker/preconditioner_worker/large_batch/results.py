"""What a cell leaves behind, and the folder that keeps the cells of one study.

::

    FOLDER/cells/OPTIMIZER-BATCH.json   one file per cell, which grows with every run
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from preconditioner_worker.code_digest import code_digest
from preconditioner_worker.contenders import AnyContender
from preconditioner_worker.large_batch.design import (
    OptimizerName,
    Record,
    StudySettings,
    beyond,
    contender,
    grid,
)
from preconditioner_worker.results import CODE as TRAINING_CODE
from preconditioner_worker.results import Environment, ResultError, differences
from preconditioner_worker.staleness.results import read, write

# What the numbers of a run depend on.
CODE = (
    *TRAINING_CODE,
    "preconditioner_worker.large_batch.cells",
    "preconditioner_worker.large_batch.design",
    "preconditioner_worker.workloads.digits_shifted",
)
GUESSING = math.log(10)
"""Nats per image of a network that knows nothing of ten digits."""


class CellRun(Record):
    """A finished run.

    Attributes:
        lr: peak learning rate.
        seed: of weights and batches.
        steps: that were made.
        held_out_loss: after each epoch, in nats per image.
        accuracy: share of the held-out images that are told right at the end.
        diverged: a loss was not finite, or the last is worse than guessing.
        versions_adopted: preconditioners, over all blocks.
        oldest: greatest age of a preconditioner in use, in steps; None where there are none.
        seconds: of processor time.
    """

    lr: float
    seed: int
    steps: int
    held_out_loss: tuple[float, ...]
    accuracy: float
    diverged: bool
    versions_adopted: int
    oldest: int | None
    seconds: float

    @property
    def final_loss(self) -> float:
        """Held-out loss at the end; infinite after a divergence."""
        return math.inf if self.diverged else self.held_out_loss[-1]


class Cell(Record):
    """An optimizer at a batch size.

    Attributes:
        optimizer: its name.
        batch_size: images a step.
        study: settings of the study.
        environment: where and by which code its runs are made.
        contender: hyperparameters at the middle of the grid.
        rates: the grid.
        tuning: runs of the grid, in its order, and of rates beyond its ends.
        runs: at the best rate, with other seeds.
    """

    optimizer: OptimizerName
    batch_size: int
    study: StudySettings
    environment: Environment
    contender: AnyContender
    rates: tuple[float, ...]
    tuning: tuple[CellRun, ...] = ()
    runs: tuple[CellRun, ...] = ()

    @classmethod
    def empty(
        cls, optimizer: OptimizerName, batch_size: int, study: StudySettings, environment: Environment
    ) -> Cell:
        """One without runs."""
        rates = grid(optimizer, batch_size)
        return cls(
            optimizer=optimizer,
            batch_size=batch_size,
            study=study,
            environment=environment,
            contender=contender(optimizer, batch_size, rates[len(rates) // 2]),
            rates=rates,
        )

    @property
    def key(self) -> str:
        """Name of its file: ``kfac-4096``."""
        return f"{self.optimizer}-{self.batch_size}"

    @property
    def best(self) -> float | None:
        """The rate with the lowest final loss; None before all are tried, or if all diverged."""
        return self._best_so_far if self.next_rate is None else None

    @property
    def next_rate(self) -> float | None:
        """The rate to try next; None once the best is known."""
        if len(self.tuning) < len(self.rates):
            return self.rates[len(self.tuning)]
        return beyond([run.lr for run in self.tuning], self._best_so_far)

    @property
    def _best_so_far(self) -> float | None:
        best = min(self.tuning, key=lambda run: run.final_loss)
        return None if best.diverged else best.lr

    def complete(self, seeds: Sequence[int]) -> bool:
        """Whether nothing is missing; there is nothing more to run where all rates diverged."""
        if self.next_rate is not None:
            return False
        return self.best is None or set(seeds) <= {run.seed for run in self.runs}

    @property
    def at_edge(self) -> bool:
        """The best rate is the least or the greatest of all that were tried: one beyond might be better."""
        tried = [run.lr for run in self.tuning]
        return self.best is not None and self.best in (min(tried), max(tried))


def environment() -> Environment:
    """Of the running process, with the digest of this study's code."""
    return Environment.here().model_copy(update={"code": code_digest(CODE)})


class Study:
    """A folder of cells with the same settings and code.

    Args:
        folder: where they are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, cell: Cell) -> Path:
        """Where a cell is kept."""
        return self.folder / "cells" / f"{cell.key}.json"

    def resume(self, empty: Cell) -> Cell:
        """The cell with the runs that it has already.

        Args:
            empty: the cell without runs, as it would be made here and now.

        Raises:
            ResultError: the file is damaged, or was made with other settings or by other code.
        """
        path = self.path(empty)
        if not path.exists():
            return empty
        held = read(path, Cell)
        if found := differences(held.model_copy(update={"tuning": (), "runs": ()}), empty):
            raise ResultError(
                f"{str(path)!r} was made otherwise ({'; '.join(found)}), and must not be mixed with new "
                f"results: choose another --folder, or remove this one"
            )
        return held

    def save(self, cell: Cell) -> None:
        """Keep a cell as it is."""
        write(self.path(cell), cell)

    def cells(self) -> list[Cell]:
        """All cells, optimizer by optimizer and by batch size.

        Raises:
            ResultError: there are none, one is damaged, or they do not belong together.
        """
        paths = sorted((self.folder / "cells").glob("*.json"))
        if not paths:
            raise ResultError(f"{str(self.folder)!r} holds no cells; make some with 'large-batch'")
        cells = [read(path, Cell) for path in paths]
        for path, cell in zip(paths, cells, strict=True):
            if path != self.path(cell):
                raise ResultError(f"{str(path)!r} holds the cell {cell.key}: was it renamed?")
            for name in ("study", "environment"):
                if found := differences(getattr(cell, name), getattr(cells[0], name)):
                    raise ResultError(
                        f"{str(path)!r} does not belong to {str(paths[0])!r}: {'; '.join(found)}"
                    )
        return sorted(cells, key=lambda cell: (cell.optimizer, cell.batch_size))
