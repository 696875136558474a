"""From what a user asked for to settled runs, and from runs to what they leave in a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import TypeAdapter
from rich.console import Console

from preconditioner_worker.comparison import Comparison, compare, table
from preconditioner_worker.contenders import AnyContender
from preconditioner_worker.optimizers import OptimizerSettings
from preconditioner_worker.plots import draw
from preconditioner_worker.results import RunResult, RunSettings
from preconditioner_worker.training import train
from preconditioner_worker.tuning import committed
from preconditioner_worker.workloads import Workload

RUNS = Path("runs")
DEFAULT_STEPS: Mapping[str, int] = {
    "text": 1500,
    "digits": 300,
    "digits-batchnorm": 300,
    "autoencoder": 1000,
    "translation": 1000,
}


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
    workload: Workload, runs: Sequence[RunSettings], folder: Path, console: Console
) -> list[RunResult]:
    """Make the runs one after the other; each is saved as soon as it is done."""
    results = []
    for settings in runs:
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
