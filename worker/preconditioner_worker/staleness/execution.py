"""The runs of a study over many cores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from rich.console import Console

from preconditioner_worker import parallel
from preconditioner_worker.staleness.results import StudyRun
from preconditioner_worker.staleness.specs import RunSpec, StudySettings
from preconditioner_worker.staleness.training import train


class Job(NamedTuple):
    """One run that is to be made."""

    spec: RunSpec
    lr: float


def execute(
    jobs: Sequence[Job],
    settings: StudySettings,
    *,
    processes: int,
    console: Console,
    done: Callable[[StudyRun], None],
) -> None:
    """Make all runs.

    Args:
        jobs: in the order in which they are begun.
        settings: of the study.
        processes: runs at a time.
        console: where progress is shown.
        done: called in this process after each run, in the order in which they end.

    Raises:
        ResultError: a process was killed. What ``done`` was called with is done.
    """

    def end(run: StudyRun) -> str:
        done(run)
        return f"{'diverged' if run.diverged else f'{run.metric}: {run.final_loss:.5f}'}, {run.seconds:.0f} s"

    works = [
        parallel.Work(job.spec.key, settings.steps, partial(train, job.spec, settings, job.lr))
        for job in jobs
    ]
    parallel.execute(works, unit="steps", processes=processes, console=console, done=end)
