"""What a run leaves behind: typed results, as JSON to read back and CSV for other tools."""

from __future__ import annotations

import contextlib
import csv
import io
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from preconditioner_worker.contenders import AnyContender
from preconditioner_worker.schedule import Schedule


class ResultError(ValueError):
    """A file of results cannot be read or written; the message names it and says why."""


class _Record(BaseModel):
    # Diverged runs hold infinities and NaN; JSON has none, so they travel as strings and come back.
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")


class RunSettings(_Record):
    """All that determines a run, apart from the text and the machine.

    Attributes:
        label: what tables and legends call the run.
        workload: its name.
        optimizer: its hyperparameters.
        schedule: of the learning rate.
        seed: of weights and batches.
        steps: length of the run.
        evaluate_every: steps between evaluations; the last step is always evaluated.
        threads: of torch.
        service_wait: seconds that the run may stand still, once after its first step, until its service is
            up: how long a machine takes to start Ray is not what a run measures. Then it goes on without.
    """

    label: str
    workload: str
    optimizer: AnyContender
    schedule: Schedule = Schedule()
    seed: int = 0
    steps: int
    evaluate_every: int
    threads: int = 1
    service_wait: float = 60.0


class StepSeries(_Record):
    """One entry per step.

    Attributes:
        loss: of the batch, before the step.
        seconds: forward, backward and optimizer.
        optimizer_seconds: the optimizer's share.
        age: of the oldest preconditioner in use, in steps; None where there is none.
        versions: adopted so far.
    """

    loss: list[float] = []
    seconds: list[float] = []
    optimizer_seconds: list[float] = []
    age: list[int | None] = []
    versions: list[int] = []


class EvaluationPoint(_Record):
    """Quality on held-out data after ``step`` steps and ``seconds`` of training (evaluations not counted)."""

    step: int
    seconds: float
    loss: float
    accuracy: float


class Environment(_Record):
    """Where a run was made."""

    python: str
    torch: str
    platform: str

    @classmethod
    def here(cls) -> Environment:
        """Of the running process."""
        return cls(python=platform.python_version(), torch=torch.__version__, platform=platform.platform())


class RunResult(_Record):
    """A finished run.

    Attributes:
        settings: what was run.
        metric: what the evaluations measure, with its unit.
        parameters: number of trained values.
        steps: one entry per step that was made.
        evaluations: in order of steps.
        diverged: a loss was not finite, and the run ended there.
        service_seconds: how long the run stood still after its first step, until the service was up; part of
            no step.
        metrics: the optimizer's own counters at the end, for those that keep any.
        environment: where it was run.
    """

    settings: RunSettings
    metric: str
    parameters: int
    steps: StepSeries
    evaluations: list[EvaluationPoint]
    diverged: bool
    service_seconds: float
    metrics: dict[str, Any]
    environment: Environment

    @property
    def final_loss(self) -> float:
        """Held-out loss at the end."""
        return self.evaluations[-1].loss

    @property
    def stem(self) -> str:
        """File name without its ending."""
        return f"{self.settings.label}-seed{self.settings.seed}"

    def save(self, folder: Path) -> Path:
        """Write ``LABEL-seedN.json`` and two CSV files into ``folder``.

        Returns:
            The path of the JSON.

        Raises:
            ResultError: one cannot be written.
        """
        series = self.steps.model_dump()
        steps = zip(*series.values(), strict=True)
        write_csv(
            folder / f"{self.stem}-steps.csv",
            ["step", *series],
            ([step, *values] for step, values in enumerate(steps, start=1)),
        )
        fields = list(EvaluationPoint.model_fields)
        write_csv(
            folder / f"{self.stem}-evaluations.csv",
            fields,
            ([getattr(point, field) for field in fields] for point in self.evaluations),
        )
        return write_text(folder / f"{self.stem}.json", self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> RunResult:
        """Read what :meth:`save` wrote.

        Raises:
            ResultError: there is no such file, or it is no result.
        """
        try:
            return cls.model_validate_json(path.read_text())
        except OSError as error:
            raise ResultError(f"cannot read results from {str(path)!r}: {error.strerror}") from error
        except ValidationError as error:
            raise ResultError(f"{str(path)!r} is not the result of a run: {error}") from error


def write_text(path: Path, text: str) -> Path:
    """Write a file whole or not at all, making its folder; returns ``path``.

    Raises:
        ResultError: it cannot be written; an earlier file of that name is as it was.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text)
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise ResultError(f"cannot write {str(path)!r}: {error.strerror}") from error
    return path


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> Path:
    """The same for a table with a line of column names."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(header)
    writer.writerows(rows)
    return write_text(path, text.getvalue())
