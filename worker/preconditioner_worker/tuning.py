"""Tuning over a committed grid, and the committed winners.

A grid is a sequence of stages; a stage tries all combinations of its values around the best settings so far.
Every trial is a whole run at the horizon it is meant for, with a seed that the demonstration does not use.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from importlib import resources
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from preconditioner_worker.contenders import AnyContender
from preconditioner_worker.results import Environment, ResultError, RunSettings, differences, write_text
from preconditioner_worker.schedule import Schedule
from preconditioner_worker.training import train
from preconditioner_worker.workloads import open_workload, text_digest

TUNING_SEED = 1


class Grid(BaseModel):
    """What to try.

    Attributes:
        workload: its name.
        start: settings before the first stage.
        steps: length of each run.
        schedule: of the learning rate.
        seed: of weights and batches.
        stages: per stage, values to try by field of the settings.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    workload: str
    start: AnyContender
    steps: int
    schedule: Schedule = Schedule()
    seed: int = TUNING_SEED
    stages: list[dict[str, list[Any]]]


class Trial(BaseModel):
    """One run of a grid; a diverged run has no loss."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    settings: AnyContender
    seed: int
    final_loss: float | None

    @property
    def score(self) -> float:
        """The loss; infinite after a divergence."""
        return math.inf if self.final_loss is None else self.final_loss


class Tuning(BaseModel):
    """A grid and what came of it.

    Attributes:
        grid: what is tried.
        trials: what was, in order.
        environment: of all trials; None in files that are older than this.
    """

    model_config = ConfigDict(extra="forbid")

    grid: Grid
    trials: list[Trial] = []
    environment: Environment | None = None

    def ranking(self) -> list[AnyContender]:
        """All settings tried, by their losses, the best first."""
        return [trial.settings for trial in sorted(self.trials, key=lambda trial: trial.score)]

    @property
    def best(self) -> AnyContender:
        """The settings with the lowest loss so far; before any, those that the grid starts from."""
        return next(iter(self.ranking()), self.grid.start)

    def save(self, path: Path) -> None:
        """Write as JSON, whole or not at all."""
        write_text(path, self.model_dump_json(indent=1) + "\n")


def load_tuning(path: Path) -> Tuning:
    """Read what :meth:`Tuning.save` wrote.

    Raises:
        ResultError: there is no such file, or it is no tuning.
    """
    try:
        return Tuning.model_validate_json(path.read_text())
    except OSError as error:
        raise ResultError(f"cannot read a tuning from {str(path)!r}: {error.strerror}") from error
    except ValidationError as error:
        raise ResultError(f"{str(path)!r} is not a tuning: {error}") from error


def committed_path(workload: str, optimizer: str) -> Path:
    """Where the package keeps the tuning of an optimizer on a workload."""
    return Path(str(resources.files("preconditioner_worker"))) / "tuned" / f"{workload}-{optimizer}.json"


def committed(workload: str, optimizer: str) -> Tuning | None:
    """The tuning that ships with the package, if there is one."""
    path = committed_path(workload, optimizer)
    return load_tuning(path) if path.exists() else None


def tune(
    grid: Grid,
    path: Path,
    *,
    processes: int = 1,
    text: Path | None = None,
    report: Callable[[Trial], None] = lambda trial: None,
) -> Tuning:
    """Run a grid; what ``path`` already holds of the same grid is not run again.

    Args:
        grid: what to try.
        path: JSON that grows with every trial.
        processes: runs at a time.
        text: of the text workload; None: the standard library.
        report: called after each trial.

    Raises:
        ResultError: ``path`` holds the results of another grid; or it lacks some, and those it has were made
            by other code, on another machine or with another text.
    """
    tuning = load_tuning(path) if path.exists() else Tuning(grid=grid)
    if tuning.grid != grid:
        raise ResultError(f"{str(path)!r} holds the results of another grid; remove it or choose another")
    # Spawned, since torch's threads do not survive a fork.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        passed: list[AnyContender] = []
        for stage in grid.stages:
            # Only what earlier stages tried, so that a run that goes on takes the same path.
            best = next((s for s in tuning.ranking() if s in passed), grid.start)
            wanted = list(combinations(best, stage))
            known = [trial.settings for trial in tuning.trials]
            new = [settings for settings in wanted if settings not in known]
            if new:
                _admit(tuning, path, text)
            for job in [pool.submit(_trial, grid, settings, text) for settings in new]:
                trial = job.result()
                tuning.trials.append(trial)
                tuning.save(path)
                report(trial)
            passed += wanted
    return tuning


def _admit(tuning: Tuning, path: Path, text: Path | None) -> None:
    """Refuse trials of two environments in one tuning."""
    here = Environment.here(text_digest(open_workload(tuning.grid.workload, text=text)))
    if not tuning.trials:
        tuning.environment = here
    held = tuning.environment
    found = ["nothing says by what code"] if held is None else differences(held, here)
    if found:
        raise ResultError(
            f"the trials in {str(path)!r} were made otherwise ({'; '.join(found)}), and must not be mixed "
            f"with new ones: remove it or choose another --output"
        )


def combinations(best: AnyContender, stage: Mapping[str, list[Any]]) -> Iterator[AnyContender]:
    """All combinations of a stage's values around ``best``."""
    for values in itertools.product(*stage.values()):
        yield type(best).model_validate({**best.model_dump(), **dict(zip(stage, values, strict=True))})


def _trial(grid: Grid, settings: AnyContender, text: Path | None) -> Trial:
    result = train(
        open_workload(grid.workload, text=text),
        RunSettings(
            label=settings.name,
            workload=grid.workload,
            optimizer=settings,
            schedule=grid.schedule,
            seed=grid.seed,
            steps=grid.steps,
            evaluate_every=grid.steps,
        ),
    )
    return Trial(settings=settings, seed=grid.seed, final_loss=None if result.diverged else result.final_loss)
