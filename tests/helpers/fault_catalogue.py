"""What each fault of the catalogue did, as a table for people and as JSON.

A test takes the fixture ``fault_report`` and tells it what happens as it happens::

    with fault_report.fault("service killed while computing") as fault:
        fault.injected("SIGKILL of the server")
        fault.detected("the stream broke")
        fault.recovered("12 versions adopted", within=30.0)
        histories.judge(fault)

Whatever the test finds wrong is an assertion that fails; it stands in the table as a violation too. Every row
says who noticed, and that the checker judged; where nobody has to, or it cannot, the test says so.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

_BY_THE_CHECKER = "by the checker"


@dataclass
class Record:
    """One row. Seconds to detect count from the injection; those to recover from there, or from its end."""

    fault: str
    outcome: str = "injected"
    injected: str = ""
    detected: str = ""
    seconds_to_detect: float | None = None
    recovered: str = ""
    seconds_to_recover: float | None = None
    seconds_allowed: float | None = None
    judged: str = ""
    violations: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Fault:
    """One fault as it is injected, noticed and recovered from."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self._injected_at: float | None = None
        self._lifted_at: float | None = None

    def injected(self, what: str) -> None:
        """The fault begins now."""
        self.record.injected = what
        self._injected_at = time.monotonic()

    def detected(self, how: str, at: float | None = None) -> float:
        """Somebody noticed, now or ``at`` that time; returns the seconds since the injection."""
        self.record.detected = how
        self.record.seconds_to_detect = (at or time.monotonic()) - self._begin()
        return self.record.seconds_to_detect

    def nothing_to_notice(self) -> None:
        """What happens is no error to anybody: all goes on, at most less fresh."""
        self.record.detected = "nothing to notice"

    def lifted(self) -> None:
        """The cause is gone (thawed, healed, started again): the time to recover counts from now."""
        self._begin()
        self._lifted_at = time.monotonic()

    def recovered(self, what: str, within: float) -> float:
        """All is as before, now; at most ``within`` seconds after the injection, or after :meth:`lifted`."""
        self.record.recovered = what
        self.record.seconds_to_recover = time.monotonic() - (self._lifted_at or self._begin())
        self.record.seconds_allowed = within
        assert self.record.seconds_to_recover <= within, (
            f"{self.record.fault}: {what} took {self.record.seconds_to_recover:.1f} s, allowed are {within} s"
        )
        return self.record.seconds_to_recover

    def note(self, text: str) -> None:
        """Something worth knowing, as a way in which this machine differs from what was meant."""
        self.record.notes.append(text)

    def violated(self, violations: Iterable[object]) -> None:
        """The checker judged: rules that were broken; any fails the test."""
        self.record.judged = _BY_THE_CHECKER
        found = [str(violation) for violation in violations]
        self.record.violations += found
        assert not found, f"{self.record.fault}: " + "; ".join(found[:5])

    def cannot_be_judged(self, why: str) -> None:
        """By the checker, since nobody could record anything."""
        self.record.judged = f"not judged: {why}"

    def __enter__(self) -> Fault:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and not self.record.violations:
            self.record.violations.append(f"{type(error).__name__}: {error}".splitlines()[0][:200])
        if error is None:
            unsaid = [what for what in ("injected", "detected", "judged") if not getattr(self.record, what)]
            self.record.violations += [f"the test does not say what was {what}" for what in unsaid]
            assert not unsaid, f"{self.record.fault}: {self.record.violations}"

    def _begin(self) -> float:
        assert self._injected_at is not None, "injected() comes first"
        return self._injected_at


class FaultReport:
    """All rows of one run."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def fault(self, name: str) -> Fault:
        """A new row."""
        self.records.append(Record(name))
        return Fault(self.records[-1])

    def not_injected(self, name: str, why: str, *, failed: bool) -> None:
        """A row for a test that came to no row of its own, or broke down outside of it."""
        outcome = "error" if failed else "skipped"
        record = Record(name, outcome, f"{outcome}: {why}", judged="not judged")
        if failed:
            record.violations.append(why)
        self.records.append(record)

    def table(self) -> Table:
        """For people."""
        table = Table(title="faults", title_justify="left")
        for name in ("fault", "injected", "detected"):
            table.add_column(name, overflow="fold")
        table.add_column("time to recover", justify="right")
        table.add_column("violations", overflow="fold")
        for record in self.records:
            table.add_row(
                record.fault,
                record.injected,
                _detected(record),
                _recovery(record),
                "\n".join(record.violations) or _verdict(record),
            )
        return table

    def print(self, console: Console) -> None:
        """The table, and notes below it."""
        console.print(self.table())
        for record in self.records:
            for note in record.notes:
                console.print(f"{record.fault}: {note}")
        broken = sum(bool(record.violations) for record in self.records)
        skipped = sum(record.outcome == "skipped" for record in self.records)
        console.print(f"{len(self.records) - skipped} faults, {broken} with violations; {skipped} skipped")

    def write(self, path: Path) -> None:
        """As JSON: a list of rows."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([asdict(record) for record in self.records], indent=1) + "\n")


def _detected(record: Record) -> str:
    if record.seconds_to_detect is None:
        return record.detected or "-"
    return f"{record.detected} ({record.seconds_to_detect:.2f} s)"


def _verdict(record: Record) -> str:
    return "none" if record.judged == _BY_THE_CHECKER else record.judged


def _recovery(record: Record) -> str:
    if record.seconds_to_recover is None:
        return "-"
    return f"{record.seconds_to_recover:.2f} s of {record.seconds_allowed:g} s"
