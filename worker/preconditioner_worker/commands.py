"""The commands: their options, and what they run.

An option is taken from the command line, else from the environment (``PRECONDITIONER_WORKER_TRAIN__STEPS``),
else from the section ``[train]`` of the file that ``--config`` names, else from the defaults here.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Annotated, ClassVar, get_args

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator
from rich.console import Console

from preconditioner_worker.contenders import (
    CONTENDERS,
    AdamSettings,
    AttachedAdamWSettings,
    AttachedSGDSettings,
    ContenderName,
    CurveBallSettings,
    KFACSettings,
    LAMBSettings,
    LARSSettings,
    Shampoo2020Settings,
    SynchronousShampooSettings,
)
from preconditioner_worker.demo import demonstrate
from preconditioner_worker.experiments import RUNS, conclude, horizon, run_all, settle
from preconditioner_worker.grids import GRIDS
from preconditioner_worker.headline import write_headline
from preconditioner_worker.optimizers import (
    AdagradSettings,
    AdamWSettings,
    OptimizerSettings,
    SGDSettings,
    ShampooSettings,
)
from preconditioner_worker.plots import draw
from preconditioner_worker.results import ResultError, RunSettings
from preconditioner_worker.schedule import Schedule
from preconditioner_worker.training import train
from preconditioner_worker.tuning import Trial, tune
from preconditioner_worker.workloads import WORKLOADS, open_workload

Seed = Annotated[int, Field(ge=0)]


class Command(BaseModel, ABC):
    """Options that every command has."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    text: Path | None = None
    """File or folder of text for the workload 'text'; null: the source of Python's standard library."""

    @abstractmethod
    def run(self, console: Console) -> int:
        """Carry the command out; returns the exit status."""

    def cli_cmd(self) -> None:
        """Called by the command line."""
        status = self.run(Console())
        if status:
            sys.exit(status)


class OptimizerOptions(Command):
    """Options of commands that run optimizers of choice."""

    workload: str = "text"
    """text, translation, digits, digits-batchnorm or autoencoder."""
    evaluate_every: PositiveInt = 25
    """Steps between evaluations on held-out data."""
    threads: PositiveInt = 1
    """Threads of torch; the service needs cores as well."""
    service_wait: Annotated[float, Field(ge=0)] = 60.0
    """Seconds to stand still after the first step until the service is up; not part of any step."""
    name: str | None = None
    """Folder under runs/; default: by command and workload."""
    schedule: Schedule = Schedule()
    """Shape of the learning rate, by fractions of a run."""
    adamw: AdamWSettings = AdamWSettings()
    """What differs from the tuned settings."""
    adagrad: AdagradSettings = AdagradSettings()
    """What differs from the tuned settings."""
    sgd: SGDSettings = SGDSettings()
    """What differs from the tuned settings."""
    shampoo: ShampooSettings = ShampooSettings()
    """What differs from the tuned settings."""
    adam: AdamSettings = AdamSettings()
    """What differs from the tuned settings."""
    lars: LARSSettings = LARSSettings()
    """What differs from the tuned settings."""
    lamb: LAMBSettings = LAMBSettings()
    """What differs from the tuned settings."""
    curveball: CurveBallSettings = CurveBallSettings()
    """What differs from the tuned settings."""
    shampoo_2020: Shampoo2020Settings = Shampoo2020Settings()
    """What differs from the tuned settings."""
    shampoo_sync: SynchronousShampooSettings = SynchronousShampooSettings()
    """What differs from the tuned settings."""
    kfac: KFACSettings = KFACSettings()
    """What differs from the tuned settings."""
    adamw_attached: AttachedAdamWSettings = AttachedAdamWSettings()
    """What differs from the tuned settings."""
    sgd_attached: AttachedSGDSettings = AttachedSGDSettings()
    """What differs from the tuned settings."""

    @field_validator("workload")
    @classmethod
    def _known(cls, workload: str) -> str:
        if workload not in WORKLOADS:
            raise ValueError(f"no workload is called {workload!r}; there are {', '.join(sorted(WORKLOADS))}")
        return workload

    def _run_settings(self, optimizer: str, seed: int, steps: int | None) -> RunSettings:
        explicit: OptimizerSettings = getattr(self, optimizer.replace("-", "_"))
        return RunSettings(
            label=optimizer,
            workload=self.workload,
            optimizer=settle(self.workload, optimizer, explicit),
            schedule=self.schedule,
            seed=seed,
            steps=horizon(self.workload, optimizer, steps),
            evaluate_every=self.evaluate_every,
            threads=self.threads,
            service_wait=self.service_wait,
            text=self.text,
        )


class Train(OptimizerOptions):
    """Train one model with one optimizer."""

    optimizer: ContenderName = "shampoo"
    """Which optimizer."""
    steps: PositiveInt | None = None
    """Length of the run; null: what the optimizer was tuned for."""
    seed: Seed = 0
    """Of weights and batches."""

    def run(self, console: Console) -> int:
        """See :class:`Command`. The exit status is 1 after a divergence."""
        workload = open_workload(self.workload, text=self.text)
        settings = self._run_settings(self.optimizer, self.seed, self.steps)
        result = train(workload, settings, console=console)
        folder = RUNS / (self.name or f"train-{self.workload}-{self.optimizer}")
        saved = result.save(folder)
        picture = draw([result], folder / "curves.png")
        end = "diverged" if result.diverged else f"held-out loss {result.final_loss:.4f}"
        console.print(f"{self.optimizer}: {end} after {len(result.steps.loss)} steps")
        console.print(f"{saved}\n{picture}", highlight=False, soft_wrap=True)
        return int(result.diverged)


class Compare(OptimizerOptions):
    """Train with several optimizers; steps and wall time to the baseline's final loss.

    An interrupted comparison goes on where it was.
    """

    optimizers: list[ContenderName] = list(get_args(ContenderName))
    """Which, as in --optimizers adamw,shampoo; default: all."""
    baseline: ContenderName = "adamw"
    """Whose final held-out loss is the target."""
    steps: dict[str, PositiveInt] = {}
    """Length of the runs, as in --steps shampoo=800; default: what an optimizer was tuned for."""
    seeds: list[Seed] = [0, 2, 3]
    """One run of each optimizer per seed, as in --seeds 0,2,3; tunings have the seed 1."""

    @field_validator("steps")
    @classmethod
    def _known_optimizers(cls, steps: dict[str, int]) -> dict[str, int]:
        for name in steps:
            if name not in CONTENDERS:
                raise ValueError(f"no optimizer is called {name!r}; there are {', '.join(CONTENDERS)}")
        return steps

    def run(self, console: Console) -> int:
        """See :class:`Command`."""
        workload = open_workload(self.workload, text=self.text)
        names = dict.fromkeys([self.baseline, *self.optimizers])
        # Seed by seed, so that what is compared ran on the machine at about the same time.
        runs = [self._run_settings(n, seed, self.steps.get(n)) for seed in self.seeds for n in names]
        folder = RUNS / (self.name or f"compare-{self.workload}")
        results = run_all(workload, runs, folder, console, resume=True)
        _, picture = conclude(results, self.baseline, folder, console)
        console.print(f"{picture}", highlight=False, soft_wrap=True)
        return 0


class Demo(Command):
    """Tuned AdamW against asynchronous Shampoo with a service of its own; a few minutes on two cores."""

    steps_adamw: PositiveInt | None = None
    """Length of AdamW's run; null: what it was tuned for."""
    steps_shampoo: PositiveInt | None = None
    """Length of Shampoo's run; null: what it was tuned for."""
    evaluate_every: PositiveInt = 10
    """Steps between evaluations on held-out data."""
    seed: Seed = 0
    """Of weights and batches."""
    name: str = "demo"
    """Folder under runs/."""

    def run(self, console: Console) -> int:
        """See :class:`Command`. The exit status is 1 if Shampoo misses AdamW's loss."""
        summary = demonstrate(
            open_workload("text", text=self.text),
            RUNS / self.name,
            console,
            steps_adamw=self.steps_adamw,
            steps_shampoo=self.steps_shampoo,
            evaluate_every=self.evaluate_every,
            seed=self.seed,
        )
        console.print(
            f"preconditioners: {summary.versions_adopted} adopted for {summary.blocks} blocks, oldest used "
            f"{summary.age_max} steps (bound {summary.max_staleness}), {summary.waits} waits"
        )
        if summary.steps_shampoo is None:
            console.print("[bold]Shampoo did not reach AdamW's final loss within its steps.[/bold]")
        else:
            console.print(
                f"Shampoo reached AdamW's final loss in {summary.steps_ratio:.2f} of its steps "
                f"and {summary.wall_ratio:.2f} of its time"
            )
        console.print(f"picture: {summary.picture}", highlight=False, soft_wrap=True)
        return int(summary.steps_shampoo is None)


class Tune(Command):
    """Run a committed grid of settings; an interrupted one goes on where it was."""

    workload: str = "text"
    """text, translation, digits, digits-batchnorm or autoencoder."""
    optimizer: ContenderName = "adamw"
    """Which optimizer."""
    processes: PositiveInt = 1
    """Runs at a time."""
    output: Path | None = None
    """JSON of the results; null: under runs/tune/."""

    def run(self, console: Console) -> int:
        """See :class:`Command`."""
        grid = GRIDS.get((self.workload, self.optimizer))
        if grid is None:
            known = ", ".join(f"{workload} {optimizer}" for workload, optimizer in GRIDS)
            raise ResultError(f"no grid for {self.workload} {self.optimizer}; there are: {known}")

        def report(trial: Trial) -> None:
            loss = "diverged" if trial.final_loss is None else f"{trial.final_loss:.4f}"
            changed = trial.settings.model_dump(include=trial.settings.model_fields_set - {"name"})
            varied = {field for stage in grid.stages for field in stage}
            shown = ", ".join(f"{key}={value}" for key, value in changed.items() if key in varied)
            console.print(f"{loss}  seed={trial.seed}, {shown}", highlight=False, soft_wrap=True)

        path = self.output or RUNS / "tune" / f"{self.workload}-{self.optimizer}.json"
        tuning = tune(grid, path, processes=self.processes, text=self.text, report=report)
        console.print(f"best: {tuning.best!r}\n{path}", highlight=False, soft_wrap=True)
        return 0


class Headline(Command):
    """Published figures beside those of committed results, as Markdown; runs nothing."""

    results: Path = Path("worker/results")
    """Folder with demo/, compare/ and staleness/."""
    output: Path | None = None
    """Markdown file; null: README.md in the same folder."""

    def run(self, console: Console) -> int:
        """See :class:`Command`."""
        path = write_headline(self.results, self.output or self.results / "README.md")
        console.print(f"{path}", highlight=False, soft_wrap=True)
        return 0
