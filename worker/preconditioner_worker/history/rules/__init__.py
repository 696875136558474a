"""One module for each rule: a function from a case to findings."""

from collections.abc import Callable, Sequence

from preconditioner_worker.history.case import Case
from preconditioner_worker.history.findings import Findings
from preconditioner_worker.history.rules.adoption import check_adoption
from preconditioner_worker.history.rules.ages import check_ages
from preconditioner_worker.history.rules.diagonal import check_diagonal
from preconditioner_worker.history.rules.waits import check_waits

CHECKS: Sequence[Callable[[Case], Findings]] = (check_waits, check_ages, check_diagonal, check_adoption)
"""All of them."""
