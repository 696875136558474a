"""The runs of a cell: its rates, then the best one with other seeds; each is kept as it ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from torch import nn

from preconditioner_worker.large_batch.design import contender, epoch_steps
from preconditioner_worker.large_batch.results import GUESSING, Cell, CellRun, Study, environment
from preconditioner_worker.results import ResultError, RunSettings, differences
from preconditioner_worker.training import train
from preconditioner_worker.workloads import Evaluation
from preconditioner_worker.workloads.digits_shifted import ShiftedDigitsWorkload

Report = Callable[[int], None]
"""Is told the number of epochs made in all runs of the cell."""


def make(empty: Cell, seeds: Sequence[int], study: Study, *, report: Report = lambda epochs: None) -> Cell:
    """Make the runs that a cell lacks.

    Args:
        empty: the cell without runs.
        seeds: of the runs at the best rate; there are none if all rates diverged.
        study: keeps the cell.
        report: see :data:`Report`.

    Raises:
        ResultError: the study holds a cell that was made otherwise, or the code changed meanwhile.
    """
    if found := differences(empty.environment, environment()):
        raise ResultError(f"the code changed while the study ran ({'; '.join(found)}): start it again")
    cell = study.resume(empty)

    def run(lr: float, seed: int) -> CellRun:
        before = (len(cell.tuning) + len(cell.runs)) * cell.study.epochs
        return _run(cell, lr, seed, lambda epoch: report(before + epoch))

    while (lr := cell.next_rate) is not None:
        tried = run(lr, cell.study.tuning_seed)
        cell = cell.model_copy(update={"tuning": (*cell.tuning, tried)})
        study.save(cell)
    made = {run.seed for run in cell.runs}
    for seed in seeds:
        if cell.best is not None and seed not in made:
            done = run(cell.best, seed)
            cell = cell.model_copy(update={"runs": (*cell.runs, done)})
            study.save(cell)
    return cell


class _Reporting(ShiftedDigitsWorkload):
    """Tells of every evaluation; there is one after each epoch."""

    def __init__(self, cell: Cell, report: Report) -> None:
        super().__init__(batch_size=cell.batch_size, channels=cell.study.channels)
        self._report, self._epoch = report, 0

    def evaluate(self, model: nn.Module) -> Evaluation:
        found = super().evaluate(model)
        self._epoch += 1
        self._report(self._epoch)
        return found


def _run(cell: Cell, lr: float, seed: int, report: Report) -> CellRun:
    began = time.process_time()
    steps = epoch_steps(cell.batch_size)
    result = train(
        _Reporting(cell, report),
        RunSettings(
            label=cell.optimizer,
            workload=ShiftedDigitsWorkload.name,
            optimizer=contender(cell.optimizer, cell.batch_size, lr),
            schedule=cell.study.schedule,
            seed=seed,
            steps=cell.study.epochs * steps,
            evaluate_every=steps,
        ),
    )
    return CellRun(
        lr=lr,
        seed=seed,
        steps=len(result.steps.loss),
        held_out_loss=tuple(point.loss for point in result.evaluations),
        accuracy=result.evaluations[-1].accuracy,
        diverged=result.diverged or not result.final_loss <= GUESSING,
        versions_adopted=result.steps.versions[-1],
        oldest=max((age for age in result.steps.age if age is not None), default=None),
        seconds=time.process_time() - began,
    )
