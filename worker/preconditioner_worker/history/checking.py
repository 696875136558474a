"""Holds a history against every rule."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from preconditioner_protos.history import History, read_history
from preconditioner_worker.history.case import Case
from preconditioner_worker.history.rules import CHECKS
from preconditioner_worker.history.violation import Expectations, Violation


@dataclass(frozen=True, slots=True)
class Report:
    """Of one check.

    Attributes:
        history: what was read.
        violations: what broke a rule, by rule.
        looked_at: by check, how many things it held against its rule; 0 means that it proves nothing.
        rules: by check, the number of its rule.
    """

    history: History
    violations: tuple[Violation, ...]
    looked_at: dict[str, int]
    rules: dict[str, int]


def examine(paths: Iterable[Path | str], *, expectations: Expectations | None = None) -> Report:
    """Read histories and hold them against every rule.

    Raises:
        HistoryError: a file cannot be read, or holds a line that is no event.
    """
    case = Case(read_history(paths), expectations or Expectations())
    violations: list[Violation] = []
    looked_at: dict[str, int] = {}
    rules: dict[str, int] = {}
    for check in CHECKS:
        findings = check(case)
        looked_at[findings.check] = findings.looked_at
        rules[findings.check] = findings.rule
        violations += findings.violations
    violations.sort(key=lambda violation: violation.rule)
    return Report(case.history, tuple(violations), looked_at, rules)


def check_history(
    paths: Iterable[Path | str], *, expectations: Expectations | None = None
) -> list[Violation]:
    """What broke a rule in the histories of these files; see :func:`examine`."""
    return list(examine(paths, expectations=expectations).violations)
