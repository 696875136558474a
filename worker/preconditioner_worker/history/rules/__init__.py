"""One module for each rule: a function from a case to findings."""

from collections.abc import Callable, Sequence

from preconditioner_worker.history.case import Case
from preconditioner_worker.history.findings import Findings
from preconditioner_worker.history.rules.acknowledged import check_acknowledged
from preconditioner_worker.history.rules.adoption import check_adoption
from preconditioner_worker.history.rules.ages import check_ages
from preconditioner_worker.history.rules.diagonal import check_diagonal
from preconditioner_worker.history.rules.endings import check_endings
from preconditioner_worker.history.rules.epochs import check_epochs
from preconditioner_worker.history.rules.jobs import check_jobs
from preconditioner_worker.history.rules.memory import check_memory
from preconditioner_worker.history.rules.recovery import check_recovery
from preconditioner_worker.history.rules.roots import check_roots
from preconditioner_worker.history.rules.schedule import check_schedule
from preconditioner_worker.history.rules.service_versions import check_service_versions
from preconditioner_worker.history.rules.step_time import check_step_time
from preconditioner_worker.history.rules.waits import check_waits

CHECKS: Sequence[Callable[[Case], Findings]] = (
    check_waits,
    check_step_time,
    check_endings,
    check_ages,
    check_recovery,
    check_diagonal,
    check_adoption,
    check_epochs,
    check_service_versions,
    check_acknowledged,
    check_memory,
    check_roots,
    check_jobs,
    check_schedule,
)
"""All of them."""
