"""The training tasks by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from preconditioner_worker.workloads.autoencoder import AutoencoderWorkload
from preconditioner_worker.workloads.base import Batch, Evaluation, Workload, WorkloadError
from preconditioner_worker.workloads.digits import DigitsWorkload
from preconditioner_worker.workloads.digits_batchnorm import DigitsBatchNormWorkload
from preconditioner_worker.workloads.text import TextWorkload
from preconditioner_worker.workloads.translation import TranslationWorkload

__all__ = [
    "DEFAULT_STEPS",
    "WORKLOADS",
    "AutoencoderWorkload",
    "Batch",
    "DigitsBatchNormWorkload",
    "Evaluation",
    "TranslationWorkload",
    "Workload",
    "WorkloadError",
    "open_workload",
    "text_digest",
]

WORKLOADS: dict[str, Callable[[], Workload]] = {
    TextWorkload.name: TextWorkload.open,
    DigitsWorkload.name: DigitsWorkload,
    DigitsBatchNormWorkload.name: DigitsBatchNormWorkload,
    AutoencoderWorkload.name: AutoencoderWorkload,
    TranslationWorkload.name: TranslationWorkload,
}

DEFAULT_STEPS: Mapping[str, int] = {
    "text": 1500,
    "digits": 300,
    "digits-batchnorm": 300,
    "autoencoder": 1000,
    "translation": 1000,
}
"""Length of a run where nothing else says it."""


def open_workload(name: str, *, text: Path | None = None) -> Workload:
    """Build the workload called ``name``.

    Args:
        name: a key of :data:`WORKLOADS`.
        text: file or folder for the text workload; None: the standard library's source.

    Raises:
        WorkloadError: no such workload, or its data cannot be used.
    """
    if name not in WORKLOADS:
        raise WorkloadError(f"no workload is called {name!r}; there are {', '.join(sorted(WORKLOADS))}")
    if name == TextWorkload.name:
        return TextWorkload.open(text)
    if text is not None:
        raise WorkloadError(f"--text belongs to the workload 'text', not to {name!r}")
    return WORKLOADS[name]()


def text_digest(workload: Workload) -> str | None:
    """Digest of the text that a workload trains on; None for one whose data are the same everywhere."""
    return workload.corpus.digest if isinstance(workload, TextWorkload) else None
