"""The command ``preconditioner-worker large-batch``."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator
from rich.console import Console

from preconditioner_worker.large_batch.analysis import Row
from preconditioner_worker.large_batch.cells import make
from preconditioner_worker.large_batch.design import (
    BATCH_SIZES,
    OPTIMIZERS,
    SEEDS,
    OptimizerName,
    StudySettings,
)
from preconditioner_worker.large_batch.report import report, table
from preconditioner_worker.large_batch.results import Cell, Study, environment
from preconditioner_worker.parallel import Work, execute
from preconditioner_worker.workloads.digits_shifted import TRAINING_IMAGES

Seed = Annotated[int, Field(ge=0)]
DEFAULTS = StudySettings()


class LargeBatch(BaseModel):
    """Final quality against batch size at a fixed number of epochs; rates tuned for every pair.

    An interrupted study goes on where it was.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    folder: Path = Path("runs/large-batch")
    """Of the study; one that holds cells of other settings or other code is refused."""
    optimizers: list[OptimizerName] = list(OPTIMIZERS)
    """Which, as in --optimizers sgd,kfac."""
    batch_sizes: list[PositiveInt] = list(BATCH_SIZES)
    """Images a step, as in --batch-sizes 32,4096; the largest are begun first."""
    epochs: PositiveInt = DEFAULTS.epochs
    """Length of every run."""
    seeds: list[Seed] = list(SEEDS)
    """One run per seed at the best rate; the grids have the seed 1."""
    processes: PositiveInt = os.cpu_count() or 1
    """Cells at a time; each takes one core."""
    report_only: bool = False
    """Write report, analysis and picture again, from the files of the study alone."""

    @field_validator("batch_sizes")
    @classmethod
    def _within_the_set(cls, sizes: list[int]) -> list[int]:
        for size in sizes:
            if size > TRAINING_IMAGES:
                raise ValueError(f"a batch of {size} is more than the {TRAINING_IMAGES} training images")
        return sizes

    @field_validator("seeds")
    @classmethod
    def _not_of_the_tuning(cls, seeds: list[int]) -> list[int]:
        if DEFAULTS.tuning_seed in seeds:
            raise ValueError(f"the seed {DEFAULTS.tuning_seed} chose the rates; take others")
        return seeds

    def cli_cmd(self) -> None:
        """Make the runs that are missing, then report."""
        console = Console()
        if not self.report_only:
            self._make(console)
        analysis, path = report(self.folder)
        console.print(table(analysis))
        if analysis.missing:
            console.print(f"partial: without {'; '.join(analysis.missing)}", highlight=False, soft_wrap=True)
        console.print(f"{path}", highlight=False, soft_wrap=True)

    def _make(self, console: Console) -> None:
        study, settings, here = Study(self.folder), StudySettings(epochs=self.epochs), environment()
        empty = [
            Cell.empty(optimizer, size, settings, here)
            for size in sorted(set(self.batch_sizes), reverse=True)
            for optimizer in dict.fromkeys(self.optimizers)
        ]
        seeds = list(dict.fromkeys(self.seeds))
        # All are looked at first: nothing is trained for a study that will be refused.
        todo = [cell for cell in empty if not study.resume(cell).complete(seeds)]
        console.print(f"{len(empty) - len(todo)} of {len(empty)} cells are there already", highlight=False)

        def end(cell: Cell) -> str:
            row = Row.of(cell)
            if row.loss is None or row.accuracy is None:
                return "diverged"
            return f"rate {row.lr:g}, held-out loss {row.loss.mean:.4f}, accuracy {row.accuracy.mean:.2%}"

        works = [
            Work(
                cell.key,
                (len(cell.rates) + len(seeds)) * settings.epochs,
                partial(make, cell, seeds, study),
            )
            for cell in todo
        ]
        execute(works, unit="epochs", processes=self.processes, console=console, done=end)
