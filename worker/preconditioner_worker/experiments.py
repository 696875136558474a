"""From what a user asked for to settled runs, and from runs to what they leave in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter
from rich.console import Console

from preconditioner_worker.comparison import Comparison, compare, table
from preconditioner_worker.contenders import AnyContender
from preconditioner_worker.optimizers import OptimizerSettings
from preconditioner_worker.plots import draw
from preconditioner_worker.results import Environment, RunResult, RunSettings, load_same
from preconditioner_worker.training import train
from preconditioner_worker.tuning import committed
from preconditioner_worker.workloads import DEFAULT_STEPS, Workload, text_digest

RUNS = Path("runs")


def settle(workload: str, optimizer: str, explicit: OptimizerSettings | None = None) -> AnyContender:
    """Settings of an optimizer on a workload: what was set explicitly, else tuned, else the defaults.

    Where roots come from is no hyperparameter: tunings use exact virtual delays, runs the real service.
    """
    tuning = committed(workload, optimizer)
    base = TypeAdapter(AnyContender).validate_python({"name": optimizer}) if tuning is None else tuning.best
    changes = {} if explicit is None else explicit.model_dump(include=explicit.model_fields_set)
    return type(base).model_validate({**base.model_dump(exclude={"service"}), **changes})


def horizon(workload: str, optimizer: str, steps: int | None = None) -> int:
    """Length of a run: what was asked for, else what the optimizer was tuned for, else the workload's."""
    if steps is not None:
        return steps
    tuning = committed(workload, optimizer)
    return DEFAULT_STEPS[workload] if tuning is None else tuning.grid.steps


def run_all(
    workload: Workload, runs: Sequence[RunSettings], folder: Path, console: Console, *, resume: bool = False
) -> list[RunResult]:
    """Make the runs one after the other; each is saved as soon as it is done.

    Args:
        workload: of all of them.
        runs: in their order.
        folder: for the results.
        console: where progress is shown.
        resume: take what the folder holds already of the same runs.

    Raises:
        ResultError: with ``resume``, the folder holds results of other settings or of other code.
    """
    # All are looked at first: nothing is trained for a comparison that will be refused.
    here = Environment.here(text_digest(workload))
    held = [load_same(settings, folder, here) if resume else None for settings in runs]
    results = []
    for settings, result in zip(runs, held, strict=True):
        if result is None:
            result = train(workload, settings, console=console)
            result.save(folder)
        results.append(result)
    return results


def conclude(
    results: Sequence[RunResult], baseline: str, folder: Path, console: Console
) -> tuple[Comparison, Path]:
    """Compare, draw, print; returns the comparison and the path of the picture."""
    comparison = compare(results, baseline)
    comparison.save(folder / "comparison.json")
    picture = draw(results, folder / "curves.png", comparison=comparison)
    console.print(table(comparison))
    return comparison, picture
