"""What a run leaves behind: typed results, as JSON to read back and CSV for other tools."""

from __future__ import annotations

import contextlib
import csv
import io
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, ValidationError, model_serializer

from preconditioner_worker.code_digest import CLIENT, code_digest
from preconditioner_worker.contenders import AnyContender
from preconditioner_worker.machine import cpu_model
from preconditioner_worker.schedule import Schedule

# What the numbers of a run depend on, beside the code of the client.
CODE = (
    *CLIENT,
    *(
        f"preconditioner_client.{module}"
        for module in (
            "attach", "attached_groups", "attached_moments", "attached_state", "attachment",
            "kfac.adaptive_refresh", "kfac.diagonals", "kfac.engine", "kfac.factor_stack", "kfac.factors",
            "kfac.layers", "kfac.optimizer", "kfac.recording", "kfac.reduction",
        )
    ),
    *(
        f"preconditioner_worker.{module}"
        for module in (
            "contenders", "optimizers", "schedule", "training",
            "rivals.checks", "rivals.curveball", "rivals.lamb", "rivals.lars", "rivals.layerwise",
            "workloads", "workloads.autoencoder", "workloads.base", "workloads.digits",
            "workloads.digits_batchnorm", "workloads.encoder_decoder", "workloads.language",
            "workloads.text", "workloads.transformer", "workloads.translation",
        )
    ),
)  # fmt: skip


class ResultError(ValueError):
    """A file of results cannot be read or written; the message names it and says why."""


class _Record(BaseModel):
    # Diverged runs hold infinities and NaN; JSON has none, so they travel as strings and come back.
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")


class RunSettings(_Record):
    """All that determines a run, apart from the machine.

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
        text: file or folder of the text workload; None: the standard library.
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
    text: Path | None = None

    @property
    def stem(self) -> str:
        """Name of the files of its result, without their endings."""
        return f"{self.label}-seed{self.seed}"


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
    """Where a run was made, and by which code.

    Attributes:
        python: version.
        torch: version.
        numpy: version.
        platform: operating system.
        cpu: instruction set that torch computes with; other ones round differently.
        code: digest of the code in :data:`CODE`.
        cpu_model: processor; None in files that are older than this.
        text: digest of the text that was trained on; None for other workloads, and in older files.
    """

    python: str
    torch: str
    numpy: str
    platform: str
    cpu: str
    code: str
    cpu_model: str | None = None
    text: str | None = None

    @model_serializer(mode="wrap")
    def _as_it_was(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # What an older file does not say is not said when it is written again.
        return {name: value for name, value in handler(self).items() if value is not None}

    @classmethod
    def here(cls, text: str | None = None) -> Environment:
        """Of the running process, which trains on a text of this digest."""
        return cls(
            python=platform.python_version(),
            torch=torch.__version__,
            numpy=np.__version__,
            platform=platform.platform(),
            cpu=f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
            code=code_digest(CODE),
            cpu_model=cpu_model(),
            text=text,
        )


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
            folder / f"{self.settings.stem}-steps.csv",
            ["step", *series],
            ([step, *values] for step, values in enumerate(steps, start=1)),
        )
        fields = list(EvaluationPoint.model_fields)
        write_csv(
            folder / f"{self.settings.stem}-evaluations.csv",
            fields,
            ([getattr(point, field) for field in fields] for point in self.evaluations),
        )
        return write_text(folder / f"{self.settings.stem}.json", self.model_dump_json(indent=1) + "\n")

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


def load_same(settings: RunSettings, folder: Path, environment: Environment) -> RunResult | None:
    """The result of a run that was made before in the same environment; None if it was not.

    Raises:
        ResultError: the folder holds the result of another run in its place.
    """
    path = folder / f"{settings.stem}.json"
    if not path.exists():
        return None
    result = RunResult.load(path)
    found = [
        *differences(result.settings, settings),
        *differences(result.environment, environment),
    ]
    if found:
        raise ResultError(
            f"{str(path)!r} was made otherwise ({'; '.join(found)}), and must not be mixed with new "
            f"results: choose another --name, or remove the folder"
        )
    return result


def differences(held: BaseModel, wanted: BaseModel) -> list[str]:
    """What differs between two records, as text with both values: ``steps 300 is not 500``."""
    old, new = (_flat(record.model_dump(mode="json")) for record in (held, wanted))
    return [
        f"{name} {old.get(name)} is not {new.get(name)}"
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name)
    ]


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        nested = _flat(value) if isinstance(value, dict) else None
        found |= {name: value} if nested is None else {f"{name}.{key}": v for key, v in nested.items()}
    return found


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
