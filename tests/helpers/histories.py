"""Histories of the processes of a test, and the checker as their judge."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from pathlib import Path

from fault_catalogue import Fault
from preconditioner_protos.history import HistoryRecorder
from preconditioner_worker.history import Expectations, Report, examine

OF_A_SERVICE = ("jobs", "service_versions", "acknowledged", "memory")
"""What a service and whoever spoke to it give the checker to look at."""

OF_TRAINING = (*OF_A_SERVICE, "waits", "step_time", "ages", "diagonal", "adoption", "epochs", "roots")
"""What a trainer beside it adds: all, but the schedule and the recovery, which no trainer here asks for."""


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

    def recorder(self) -> HistoryRecorder:
        """For a trainer that speaks the protocol by hand; of digests alone, as the service saves matrices."""
        return HistoryRecorder(self._directory / f"trainer-{next(self._numbers)}.jsonl", "trainer")

    def judge(self, fault: Fault, *, seen: Collection[str] = OF_TRAINING) -> Report:
        """Hold all that happened until now against every rule; what is broken is the fault's violation.

        Args:
            fault: the row that is judged.
            seen: the checks that must have had something to look at, else they prove nothing.

        Returns:
            What was read and found.
        """
        paths = sorted(self._directory.glob("*.jsonl"))
        assert paths, "nobody recorded anything"
        # A sample of the roots at a time, since all that happened before is judged once more.
        report = examine(paths, expectations=Expectations(matrices=self._matrices, roots=100))
        idle = [check for check in seen if not report.looked_at[check]]
        assert not idle, f"{', '.join(idle)} had nothing to look at: {report.looked_at}"
        new = [text for text in map(str, report.violations) if text not in self._told]
        self._told.update(new)
        fault.violated(new)
        return report
