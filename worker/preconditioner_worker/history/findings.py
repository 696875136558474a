"""What one check found."""

from __future__ import annotations

from dataclasses import dataclass, field

from preconditioner_protos.history import Event
from preconditioner_worker.history.violation import Violation


@dataclass(slots=True)
class Findings:
    """Of one check: collects violations, and counts what was looked at.

    Attributes:
        rule: number of the rule.
        check: name of the check.
    """

    rule: int
    check: str
    looked_at: int = 0
    violations: list[Violation] = field(default_factory=list)

    def broken(self, message: str, *events: Event) -> None:
        """The rule was broken."""
        self.violations.append(Violation(self.rule, self.check, message, events))
