"""Which results may stand beside each other: those of the same code, settings and numerical libraries."""

from __future__ import annotations

import platform

import numpy as np
import torch

from preconditioner_worker.code_digest import CLIENT
from preconditioner_worker.code_digest import code_digest as digest_of
from preconditioner_worker.machine import cpu_model
from preconditioner_worker.staleness.specs import Record, StudySettings
from preconditioner_worker.staleness.tasks import TASKS

# What a run's numbers depend on.
CODE = (
    *CLIENT,
    "preconditioner_worker.optimizers",
    "preconditioner_worker.schedule",
    "preconditioner_worker.workloads.base",
    "preconditioner_worker.workloads.text",
    "preconditioner_worker.workloads.transformer",
    "preconditioner_worker.staleness.arms",
    "preconditioner_worker.staleness.controls",
    "preconditioner_worker.staleness.optimizers",
    "preconditioner_worker.staleness.regression_task",
    "preconditioner_worker.staleness.specs",
    "preconditioner_worker.staleness.task",
    "preconditioner_worker.staleness.tasks",
    "preconditioner_worker.staleness.text_task",
    "preconditioner_worker.staleness.training",
)


class Fingerprint(Record):
    """Of a run.

    Attributes:
        settings: of the study.
        code: digest of the code in :data:`CODE`, comments, docstrings and layout left out.
        torch: version.
        numpy: version.
        cpu: instruction set that torch computes with; other ones round differently.
        cpu_model: processor; None in files that are older than this, as are the next two.
        python: version; its standard library is a text.
        text: digest of the task's data.
    """

    settings: StudySettings
    code: str
    torch: str
    numpy: str
    cpu: str
    cpu_model: str | None = None
    python: str | None = None
    text: str | None = None

    @classmethod
    def here(cls, settings: StudySettings) -> Fingerprint:
        """Of a run that this process would make."""
        return cls(
            settings=settings,
            code=code_digest(),
            torch=torch.__version__,
            numpy=np.__version__,
            cpu=f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
            cpu_model=cpu_model(),
            python=platform.python_version(),
            text=TASKS[settings.task].open().data_digest,
        )

    def differences(self, other: Fingerprint) -> list[str]:
        """What differs, as text with both values: ``steps 12000 is not 6000``."""
        found = []
        mine, others = self.model_dump(mode="json"), other.model_dump(mode="json")
        mine.update(mine.pop("settings"))
        others.update(others.pop("settings"))
        for name, value in mine.items():
            if value != others[name]:
                found.append(f"{name} {value} is not {others[name]}")
        return found


def code_digest() -> str:
    """Digest of the code in :data:`CODE`: 16 hexadecimal digits."""
    return digest_of(CODE)
