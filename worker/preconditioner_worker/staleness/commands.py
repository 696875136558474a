"""The commands of ``preconditioner-worker staleness``: run, tune, real, report."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator
from pydantic_settings import CliApp, CliSubCommand
from rich.console import Console

from preconditioner_worker.results import ResultError
from preconditioner_worker.staleness.arms import PUBLISHED_N, ArmKind
from preconditioner_worker.staleness.execution import Job, execute
from preconditioner_worker.staleness.fingerprint import Fingerprint
from preconditioner_worker.staleness.rates import GRIDS, rate, rates, tune
from preconditioner_worker.staleness.real import REAL_FILE, compare
from preconditioner_worker.staleness.report import headline, report
from preconditioner_worker.staleness.results import Study, write
from preconditioner_worker.staleness.specs import RunSpec, Statistics, StudySettings, arm_runs, control_runs
from preconditioner_worker.staleness.tasks import TASKS

Seed = Annotated[int, Field(ge=0)]
DEFAULTS = StudySettings()


class _Options(BaseModel):
    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    task: str = DEFAULTS.task
    """text, or regression, whose steps are a tenth as dear and its runs longer."""

    @field_validator("task")
    @classmethod
    def _known(cls, task: str) -> str:
        if task not in TASKS:
            raise ValueError(f"no task is called {task!r}; there are {', '.join(sorted(TASKS))}")
        return task


class StalenessRun(_Options):
    """Make the runs of a study and report; an interrupted one goes on where it was."""

    folder: Path = Path("runs/staleness")
    """Of the study; one that holds other settings or other code's runs is refused."""
    arms: list[ArmKind] = list(ArmKind)
    """Which, as in --arms A: P(N) refreshed every N, L(D) D steps late, A(N) as published."""
    delays: list[PositiveInt] = list(PUBLISHED_N)
    """Values of N and D; 1 is always among them."""
    seeds: list[Seed] = [0, 1, 2, 3, 4]
    """One run of each condition per seed."""
    statistics: list[Statistics] = ["sum"]
    """Accumulated as a sum (published), as an EMA, or both in turn; an EMA needs 'staleness tune' first."""
    grafting: list[Literal["on", "off"]] = ["on"]
    """Whether a step has AdaGrad's length; off needs 'staleness tune' first."""
    controls: bool = True
    """Run AdamW without decay, AdaGrad, the grafted diagonal, the first one frozen, random directions, and a
    late start."""
    steps: PositiveInt | None = None
    """Length of a run; null: the task's own, 12000 for text, 100000 for regression."""
    evaluate_every: PositiveInt | None = None
    """Steps between evaluations on held-out data; null: the task's own, 50 for text, 500 for regression."""
    blend_steps: Annotated[int, Field(ge=0)] = DEFAULTS.blend_steps
    """Steps over which a block's direction passes from the diagonal to the preconditioned one."""
    jobs: PositiveInt = os.cpu_count() or 1
    """Runs at a time; each takes one core."""

    def cli_cmd(self) -> None:
        """Run what is missing, then report."""
        console = Console()
        own = TASKS[self.task].settings
        settings = own.model_copy(
            update={
                "steps": self.steps or own.steps,
                "evaluate_every": self.evaluate_every or own.evaluate_every,
                "blend_steps": self.blend_steps,
            }
        )
        # Before the folder is begun: without a rate there is no study.
        tuned = rates(self.task, self.specs())
        wanted = [Job(spec, tuned[spec.tuned_as]) for spec in self.specs()]
        study = Study(self.folder)
        study.begin(Fingerprint.here(settings))
        todo = [job for job in wanted if study.load(job.spec, job.lr) is None]
        console.print(f"{len(wanted) - len(todo)} of {len(wanted)} runs are there already", highlight=False)
        execute(todo, settings, processes=self.jobs, console=console, done=study.save)
        conclude(self.folder, None, console)

    def specs(self) -> list[RunSpec]:
        """All runs, seed by seed, so that an interrupted study has whole seeds; first what verdicts need."""
        found: list[RunSpec] = []
        for seed, statistics, choice in itertools.product(self.seeds, self.statistics, self.grafting):
            grafting = choice == "on"
            found += arm_runs(self.arms, self.delays, statistics, grafting, [seed])
            if self.controls:
                found += control_runs(statistics, grafting, [seed], max(self.delays))
        # Without duplicates: a control without statistics is the same with all of them.
        return sorted(dict.fromkeys(found), key=lambda spec: spec.method == "late")


class StalenessTune(_Options):
    """Tune one learning rate per optimizer, at N = 1 and a quarter of the study's length."""

    optimizers: list[str] = list(GRIDS)
    """Which, as in --optimizers adamw,shampoo-sum-grafted."""
    jobs: PositiveInt = os.cpu_count() or 1
    """Runs at a time."""
    output: Path | None = None
    """Folder of the results; null: the package's own, where studies find them."""

    @field_validator("optimizers")
    @classmethod
    def _with_grid(cls, optimizers: list[str]) -> list[str]:
        for name in optimizers:
            if name not in GRIDS:
                raise ValueError(f"no grid for {name!r}; there are {', '.join(GRIDS)}")
        return optimizers

    def cli_cmd(self) -> None:
        """Run the grids, print the winners."""
        console = Console()
        settings = TASKS[self.task].settings
        for tuning in tune(self.optimizers, settings, self.output, processes=self.jobs, console=console):
            trials = ", ".join(
                f"{t.lr:g}: {'diverged' if t.final_loss is None else f'{t.final_loss:.5f}'}"
                for t in tuning.trials
            )
            console.print(f"{tuning.optimizer}: {tuning.best:g} of {trials}", highlight=False, soft_wrap=True)


class StalenessReal(_Options):
    """Make one run of A(N) through an embedded service and lay it beside the virtual one."""

    folder: Path = Path("runs/staleness")
    """Where the comparison is kept, for the report."""
    delay: PositiveInt = 50
    """N, in steps."""
    steps: PositiveInt = 600
    """Length of both runs."""
    seed: Seed = 0
    """Of weights and batches."""
    statistics: Statistics = "sum"
    """Accumulated as a sum or as an EMA."""

    def cli_cmd(self) -> None:
        """Run twice, compare, keep. The exit status is 1 if the logged ages are not the arm's."""
        spec = RunSpec(method="A", n=self.delay, statistics=self.statistics, grafting=True, seed=self.seed)
        settings = StudySettings(task=self.task, steps=self.steps, drift_every=self.steps + 1)
        found = compare(Job(spec, rate(self.task, spec)), settings)
        write(self.folder / REAL_FILE, found)
        Console().print(found.describe(), highlight=False, soft_wrap=True)
        if not found.ages_match:
            raise ResultError("the ages logged through the service are not those of the arm")


class StalenessReport(BaseModel):
    """Write report, analysis and pictures again, from the files of a study alone."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    folder: Path = Path("runs/staleness")
    """Of the study."""
    output: Path | None = None
    """Where to; null: the same folder."""

    def cli_cmd(self) -> None:
        """See :func:`preconditioner_worker.staleness.report.report`."""
        conclude(self.folder, self.output, Console())


class Staleness(BaseModel):
    """How late may a preconditioner be? Delays exact in steps, controls, criteria fixed beforehand."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    run: CliSubCommand[StalenessRun]
    tune: CliSubCommand[StalenessTune]
    real: CliSubCommand[StalenessReal]
    report: CliSubCommand[StalenessReport]

    def cli_cmd(self) -> None:
        """Run the command that was named."""
        CliApp.run_subcommand(self)


def conclude(folder: Path, output: Path | None, console: Console) -> None:
    """Report, and print the verdict of every N."""
    analysis, path = report(folder, output)
    for part in analysis.parts:
        console.print(f"[bold]{headline(part)}[/bold]", highlight=False, soft_wrap=True)
        for row in part.rows + part.controls:
            if row.verdict is not None:
                console.print(
                    f"  {row.condition}: {row.verdict.value} ({row.reason})", highlight=False, soft_wrap=True
                )
        for late_start in part.late_starts:
            console.print(f"  {late_start.describe(part.decimals)}", highlight=False, soft_wrap=True)
    if analysis.missing:
        console.print(f"reduced: without {'; '.join(analysis.missing)}", highlight=False, soft_wrap=True)
    console.print(f"{path}", highlight=False, soft_wrap=True)
