"""The Ray actor that computes roots."""

from __future__ import annotations

import os

import numpy as np

from preconditioner_service.tasks import RootOutcome, RootTask


class RootWorker:
    """The actor. Its methods run one at a time."""

    def __init__(self, threads: int) -> None:
        from preconditioner_service.compute import compute
        from preconditioner_service.roots import calibrate
        from preconditioner_service.roots import threads as bind

        self._compute = compute
        bind(threads)
        # The first decomposition of a process loads and tunes; better now than in a trainer's batch.
        calibrate()
        identity = np.ones(1, dtype=np.float32)
        compute([RootTask((1,), (4.0,), 1, 1e-6, "<f4", (identity,))])

    def ping(self) -> int:
        """The process id, as a sign of life."""
        return os.getpid()

    def compute(self, tasks: list[RootTask]) -> list[RootOutcome]:
        """See :func:`preconditioner_service.compute.compute`."""
        return self._compute(tasks)
