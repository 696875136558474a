"""The tasks of the study, by name."""

from __future__ import annotations

from collections.abc import Mapping

from preconditioner_worker.staleness.regression_task import RegressionTask
from preconditioner_worker.staleness.task import Task
from preconditioner_worker.staleness.text_task import TextTask

TASKS: Mapping[str, type[Task]] = {task.name: task for task in (TextTask, RegressionTask)}
