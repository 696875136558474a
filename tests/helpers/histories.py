"""Histories of the processes of a test, and the checker as their judge."""

from __future__ import annotations

import itertools
from collections.abc import Container
from pathlib import Path

from fault_catalogue import Fault
from preconditioner_worker.history import Expectations, examine


class Histories:
    """Files that clients and services write to, in one folder.

    Args:
        directory: empty.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._matrices = directory / "matrices"
        self._numbers = itertools.count()
        self._told: set[str] = set()

    def trainer(self) -> dict[str, str]:
        """For ``ServiceConfig``; a file of its own at every call."""
        path = self._directory / f"trainer-{next(self._numbers)}.jsonl"
        return {"history_file": str(path), "history_matrices": str(self._matrices)}

    def service(self) -> list[str]:
        """For ``serve``; a file of its own at every call."""
        path = self._directory / f"service-{next(self._numbers)}.jsonl"
        return [f"--history-file={path}", f"--history-matrices={self._matrices}"]

    def judge(self, fault: Fault, *, unrecorded: Container[str | None] = ()) -> None:
        """Hold all that happened until now against every rule; what is broken is the fault's violation.

        Args:
            fault: the row that is judged.
            unrecorded: jobs whose trainers keep no history, so that nothing is known of what they sent.
        """
        paths = sorted(self._directory.glob("*.jsonl"))
        assert paths, "nobody recorded anything"
        expectations = Expectations(matrices=self._matrices, roots=100, step_seconds=1.0)
        report = examine(paths, expectations=expectations)
        assert report.looked_at["adoption"], f"nothing was adopted: {report.looked_at}"
        judged = [
            violation
            for violation in report.violations
            if not any(event.job in unrecorded for event in violation.events)
        ]
        new = [text for text in map(str, judged) if text not in self._told]
        self._told.update(new)
        fault.violated(new)
