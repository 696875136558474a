"""What a run leaves behind, and the folder that keeps the runs of one study.

::

    FOLDER/study.json            fingerprint of the study
    FOLDER/runs/KEY.json         one file per run, written whole or not at all
    FOLDER/real.json             the run through the service, if there is one
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from preconditioner_worker.results import ResultError, write_text
from preconditioner_worker.staleness.fingerprint import Fingerprint
from preconditioner_worker.staleness.specs import Record, RunSpec

AnyModel = TypeVar("AnyModel", bound=BaseModel)


class Drift(Record):
    """How far the preconditioners in use were from fresh ones.

    Attributes:
        step: where.
        age: of those in use, in steps.
        median: over blocks and sides, of ``||P_stale - P_fresh||_F / ||P_fresh||_F``.
        largest: of the same.
    """

    step: int
    age: int
    median: float
    largest: float


class StudyRun(Record):
    """A finished run.

    Attributes:
        spec: which.
        lr: peak learning rate.
        fingerprint: of settings and code.
        steps: that were made.
        loss_digest: of all batches' losses, bit for bit.
        train_loss: mean batch loss since the last evaluation, at each evaluation.
        held_out_loss: at each evaluation; before the first step as its first entry.
        diverged: a loss was not finite, or the end was worse than the beginning.
        ages: number of steps at each age of the oldest preconditioner in use, as the optimizer logged it;
            empty for controls.
        ages_as_planned: the age of every step was that of the arm's arithmetic; None for other runs.
        drift: empty for controls.
        versions_adopted: over all blocks.
        refused: roots that could not be computed.
        waits: steps that waited for a preconditioner.
        parameters: number of trained values.
        blocks: that are preconditioned.
        metric: what the losses measure, with its unit.
        seconds: of the whole run.
    """

    spec: RunSpec
    lr: float
    fingerprint: Fingerprint
    steps: int
    loss_digest: str
    train_loss: list[float]
    held_out_loss: list[float]
    diverged: bool
    ages: dict[int, int]
    ages_as_planned: bool | None
    drift: list[Drift]
    versions_adopted: int
    refused: int
    waits: int
    parameters: int
    blocks: int
    metric: str
    seconds: float

    @property
    def final_loss(self) -> float:
        """Held-out loss at the end; infinite after a divergence."""
        return math.inf if self.diverged else self.held_out_loss[-1]

    def steps_to(self, target: float) -> float:
        """First evaluated step with a held-out loss at or below ``target``; infinite if there is none."""
        every = self.fingerprint.settings.evaluate_every
        reached = (i for i, loss in enumerate(self.held_out_loss) if loss <= target)
        index = next(reached, None)
        return math.inf if index is None else min(index * every, self.steps)


class Study:
    """A folder of runs with one fingerprint.

    Args:
        folder: where they are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def _header(self) -> Path:
        return self.folder / "study.json"

    def path(self, spec: RunSpec) -> Path:
        """Where a run is kept."""
        return self.folder / "runs" / f"{spec.key}.json"

    def begin(self, fingerprint: Fingerprint) -> None:
        """Make the folder, or go on in it.

        Raises:
            ResultError: it holds runs of other settings or of other code.
        """
        if self._header.exists():
            held = read(self._header, Fingerprint)
            if differences := held.differences(fingerprint):
                raise ResultError(
                    f"{str(self.folder)!r} holds another study ({'; '.join(differences)}); its runs cannot "
                    f"be mixed with new ones: choose another --folder, or remove this one"
                )
            return
        write(self._header, fingerprint)

    def fingerprint(self) -> Fingerprint:
        """Of the study that the folder holds.

        Raises:
            ResultError: it holds none.
        """
        return read(self._header, Fingerprint)

    def load(self, spec: RunSpec, lr: float | None = None) -> StudyRun | None:
        """A run that was made before; None if it was not.

        Args:
            spec: which.
            lr: the learning rate that it must have; None: any.

        Raises:
            ResultError: the file is damaged, or its run does not belong to this study.
        """
        path = self.path(spec)
        if not path.exists():
            return None
        run = read(path, StudyRun)
        if run.spec != spec:
            raise ResultError(f"{str(path)!r} holds the run {run.spec.key}: was it renamed?")
        if differences := self.fingerprint().differences(run.fingerprint):
            raise ResultError(
                f"{str(path)!r} does not belong to its study: {'; '.join(differences)}; remove it"
            )
        if lr is not None and run.lr != lr:
            raise ResultError(
                f"{str(path)!r} was made with the learning rate {run.lr}, not {lr}: choose another --folder, "
                f"or remove this one"
            )
        return run

    def save(self, run: StudyRun) -> None:
        """Keep a run."""
        write(self.path(run.spec), run)

    def runs(self) -> list[StudyRun]:
        """All runs, in the order of their names.

        Raises:
            ResultError: there are none, one is damaged, or they do not belong together.
        """
        paths = sorted((self.folder / "runs").glob("*.json"))
        if not paths:
            raise ResultError(f"{str(self.folder)!r} holds no runs; make some with 'staleness run'")
        found = [self.load(read(path, StudyRun).spec) for path in paths]
        runs = [run for run in found if run is not None]
        check_rates(runs)
        return runs


def check_rates(runs: Sequence[StudyRun]) -> None:
    """Refuse runs of one optimizer with several learning rates.

    Raises:
        ResultError: there are such.
    """
    rates: dict[str, StudyRun] = {}
    for run in runs:
        other = rates.setdefault(run.spec.tuned_as, run)
        if other.lr != run.lr:
            raise ResultError(
                f"{other.spec.key} has the learning rate {other.lr}, {run.spec.key} has {run.lr}: "
                f"a study has one for {run.spec.tuned_as}"
            )


def check_code(run: StudyRun, study: Fingerprint) -> None:
    """Refuse a run of other code or libraries than a study's; its settings may differ.

    Raises:
        ResultError: it is one.
    """
    same_settings = run.fingerprint.model_copy(update={"settings": study.settings})
    if differences := study.differences(same_settings):
        raise ResultError(
            f"the run {run.spec.key} through the service does not belong to this study: "
            f"{'; '.join(differences)}; make it again with 'staleness real'"
        )


def write(path: Path, record: BaseModel) -> None:
    """Write JSON, whole or not at all.

    Raises:
        ResultError: it cannot be written.
    """
    write_text(path, record.model_dump_json(indent=1) + "\n")


def read(path: Path, model: type[AnyModel]) -> AnyModel:
    """Read what :func:`write` wrote.

    Raises:
        ResultError: there is no such file, or it holds something else.
    """
    try:
        return model.model_validate_json(path.read_text())
    except OSError as error:
        raise ResultError(f"cannot read {str(path)!r}: {error.strerror}") from error
    except ValidationError as error:
        raise ResultError(f"{str(path)!r} is damaged or of another version; remove it: {error}") from error
