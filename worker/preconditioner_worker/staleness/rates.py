"""Learning rates: one per optimizer, tuned at N = 1 alone over a committed grid.

Tuned at a quarter of the study's length, with a seed that the study does not use.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path

from rich.console import Console

from preconditioner_worker.results import ResultError
from preconditioner_worker.staleness.execution import Job, execute
from preconditioner_worker.staleness.fingerprint import code_digest
from preconditioner_worker.staleness.results import StudyRun, read, write
from preconditioner_worker.staleness.specs import Record, RunSpec, StudySettings

TUNING_SEED = 1000
TUNING_SHARE = 4
"""How many times shorter the runs of a tuning are."""

GRIDS: Mapping[str, tuple[float, ...]] = {
    "adamw": (3e-3, 1e-2, 2e-2, 4e-2),
    "adagrad": (1e-2, 3e-2, 6e-2, 0.12, 0.25, 0.5),
    "diagonal": (2e-2, 3.5e-2, 6e-2, 0.1, 0.2, 0.35),
    "shampoo-sum-grafted": (2e-2, 3.5e-2, 6e-2, 0.1, 0.2, 0.35),
    "shampoo-ema-grafted": (2e-2, 3.5e-2, 6e-2, 0.1, 0.2, 0.35),
    "shampoo-sum-ungrafted": (0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
    "shampoo-ema-ungrafted": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0),
}

_REGRESSION = (0.05, 0.1, 0.2, 0.4, 0.8)
TASK_GRIDS: Mapping[str, Mapping[str, tuple[float, ...]]] = {
    "regression": {
        "adamw": (1e-3, 3e-3, 1e-2, 3e-2),
        "adagrad": (3e-2, 0.1, 0.3, 1.0),
        "diagonal": _REGRESSION,
        "shampoo-sum-grafted": _REGRESSION,
        "shampoo-ema-grafted": _REGRESSION,
    }
}
"""Where a task's rates lie elsewhere than :data:`GRIDS`."""


def grid(task: str, optimizer: str) -> tuple[float, ...]:
    """The learning rates that are tried for an optimizer, a key of :data:`GRIDS`, on a task."""
    return TASK_GRIDS.get(task, {}).get(optimizer, GRIDS[optimizer])


class RateTrial(Record):
    """One run of a tuning; no loss after a divergence."""

    lr: float
    final_loss: float | None

    @property
    def score(self) -> float:
        """The loss; infinite after a divergence."""
        return math.inf if self.final_loss is None else self.final_loss


class RateTuning(Record):
    """What came of the grid of one optimizer on one task.

    Attributes:
        optimizer: a key of :data:`GRIDS`.
        task: name.
        steps: of each run.
        seed: of weights and batches.
        code: digest of the code that made the runs.
        trials: in the order of their learning rates.
    """

    optimizer: str
    task: str
    steps: int
    seed: int
    code: str
    trials: tuple[RateTrial, ...] = ()

    @property
    def best(self) -> float:
        """The learning rate with the lowest final loss.

        Raises:
            ResultError: all diverged.
        """
        best = min(self.trials, key=lambda trial: trial.score)
        if best.final_loss is None:
            raise ResultError(f"every learning rate of {self.optimizer} on {self.task} diverged")
        return best.lr


def committed_path(task: str, optimizer: str) -> Path:
    """Where the package keeps a tuning."""
    folder = Path(str(resources.files("preconditioner_worker"))) / "staleness" / "tuned"
    return folder / f"{task}-{optimizer}.json"


def rate(task: str, spec: RunSpec) -> float:
    """The tuned learning rate of a run; see :func:`rates`."""
    return rates(task, [spec])[spec.tuned_as]


def rates(task: str, specs: Iterable[RunSpec]) -> dict[str, float]:
    """The tuned learning rates of runs, by :attr:`RunSpec.tuned_as`.

    Raises:
        ResultError: an optimizer was not tuned on this task, or not over the whole of its grid.
    """
    optimizers = sorted({spec.tuned_as for spec in specs})
    tunings = {
        optimizer: read(path, RateTuning)
        for optimizer in optimizers
        if (path := committed_path(task, optimizer)).exists()
    }
    untuned = [
        optimizer
        for optimizer in optimizers
        if optimizer not in tunings or {t.lr for t in tunings[optimizer].trials} != set(grid(task, optimizer))
    ]
    if untuned:
        raise ResultError(
            f"no learning rate of {', '.join(untuned)} is tuned over its whole grid on {task!r}: first "
            f"run 'preconditioner-worker staleness tune --task {task} --optimizers {','.join(untuned)}'"
        )
    return {optimizer: tuning.best for optimizer, tuning in tunings.items()}


def tuning_spec(optimizer: str) -> RunSpec:
    """The run that is tuned: of a Shampoo the published arm at N = 1."""
    if not optimizer.startswith("shampoo-"):
        return RunSpec.model_validate(
            {"method": optimizer, "grafting": True if optimizer == "diagonal" else None, "seed": TUNING_SEED}
        )
    _, statistics, grafting = optimizer.split("-")
    return RunSpec.model_validate(
        {
            "method": "A",
            "n": 1,
            "statistics": statistics,
            "grafting": grafting == "grafted",
            "seed": TUNING_SEED,
        }
    )


def shortened(settings: StudySettings) -> StudySettings:
    """Settings of a tuning's runs: everything that is counted in steps shrinks alike."""
    steps = max(1, settings.steps // TUNING_SHARE)
    return settings.model_copy(
        update={
            "steps": steps,
            "evaluate_every": steps,
            "drift_every": steps + 1,
            "blend_steps": settings.blend_steps // TUNING_SHARE,
        }
    )


def tune(
    optimizers: Sequence[str],
    settings: StudySettings,
    folder: Path | None,
    *,
    processes: int,
    console: Console,
) -> list[RateTuning]:
    """Run the grids of some optimizers; what the same code ran before is not run again.

    Args:
        optimizers: keys of :data:`GRIDS`.
        settings: of the study; runs are shortened.
        folder: for the results; None: the package's own.
        processes: runs at a time.
        console: where progress is shown.
    """
    short = shortened(settings)
    tunings = {}
    for optimizer in optimizers:
        empty = RateTuning(
            optimizer=optimizer, task=settings.task, steps=short.steps, seed=TUNING_SEED, code=code_digest()
        )
        path = _path(empty, folder)
        held = read(path, RateTuning) if path.exists() else empty
        same = held.model_copy(update={"trials": ()}) == empty
        tunings[optimizer] = held if same else empty

    def keep(run: StudyRun) -> None:
        optimizer = run.spec.tuned_as
        trial = RateTrial(lr=run.lr, final_loss=None if run.diverged else run.final_loss)
        trials = sorted([*tunings[optimizer].trials, trial], key=lambda trial: trial.lr)
        tunings[optimizer] = tunings[optimizer].model_copy(update={"trials": tuple(trials)})
        write(_path(tunings[optimizer], folder), tunings[optimizer])

    jobs = [
        Job(tuning_spec(optimizer), lr)
        for optimizer, tuning in tunings.items()
        for lr in grid(settings.task, optimizer)
        if lr not in {trial.lr for trial in tuning.trials}
    ]
    execute(jobs, short, processes=processes, console=console, done=keep)
    return list(tunings.values())


def _path(tuning: RateTuning, folder: Path | None) -> Path:
    path = committed_path(tuning.task, tuning.optimizer)
    return path if folder is None else folder / path.name
