"""The commands about faults: ``soak`` and ``check-history``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_settings import CliPositionalArg
from rich.console import Console
from rich.table import Table

from preconditioner_worker.faults.soak import Result, soak, table
from preconditioner_worker.history import Expectations, Report, examine
from preconditioner_worker.results import write_text

_CONFIG = ConfigDict(
    extra="forbid", use_attribute_docstrings=True, validate_by_name=True, validate_by_alias=True
)
_SHOWN = 20


class Soak(BaseModel):
    """Train two jobs against one service under random faults; a checker judges what they recorded."""

    model_config: ClassVar[ConfigDict] = _CONFIG

    minutes: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 10.0
    """From the first fault to the last; starting and judging come on top."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the schedule of faults: the same seed draws the same faults in the same order."""
    folder: Path | None = None
    """Keep histories, matrices and logs there; null: keep them only if a rule is broken."""
    json_file: Annotated[Path | None, Field(alias="json")] = None
    """Write the result to this file."""
    quiet: bool = False
    """Print the result alone, and not every fault."""

    @field_validator("folder")
    @classmethod
    def _new(cls, folder: Path | None) -> Path | None:
        if folder is not None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(
                "the folder must be new or empty, or histories of two runs would be judged as one"
            )
        return folder

    def cli_cmd(self) -> None:
        """Run, print, save; the exit status is 1 if a rule was broken or the verdict proves too little."""
        console = Console()

        def report(line: str) -> None:
            if not self.quiet:
                console.print(line, highlight=False, soft_wrap=True)

        result = soak(self.minutes, self.seed, folder=self.folder, report=report)
        console.print(table(result))
        _say(console, result)
        if self.json_file is not None:
            write_text(self.json_file, json.dumps(result.as_json(), indent=1) + "\n")
        if result.violations or result.shortfalls:
            sys.exit(1)


class CheckHistory(BaseModel):
    """Hold recorded histories against the rules; the exit status is 1 if one was broken."""

    model_config: ClassVar[ConfigDict] = _CONFIG

    files: CliPositionalArg[list[Path]]
    """Files that history_file or --history-file named, of all trainers and services that belong together."""
    matrices: Path | None = None
    """Folder that history_matrices named: roots are computed again."""
    roots: Annotated[int | None, Field(ge=0)] = None
    """How many preconditioners are computed again at most, spread evenly over the run; null: all."""
    step_factor: Annotated[float, Field(gt=0)] = 20.0
    """The 99th percentile of a job's steps is at most so many of its median steps, or --step-seconds."""
    step_seconds: Annotated[float, Field(gt=0)] = 0.25
    """A 99th percentile that is always allowed: a loaded machine keeps a process waiting for its core."""
    longest_step: Annotated[float, Field(gt=0)] = 3.0
    """No single step takes longer, nor so many medians as --step-factor says."""
    service_rss: Annotated[int | None, Field(ge=1)] = None
    """Resident bytes that the service may have; null: not bounded."""
    json_file: Annotated[Path | None, Field(alias="json")] = None
    """Write what was found to this file."""

    def cli_cmd(self) -> None:
        """Check, print, save."""
        report = examine(
            self.files,
            expectations=Expectations(
                matrices=self.matrices,
                roots=self.roots,
                step_factor=self.step_factor,
                step_seconds=self.step_seconds,
                longest_step=self.longest_step,
                service_rss=self.service_rss,
            ),
        )
        console = Console()
        console.print(_checks(report))
        _list(console, [str(violation) for violation in report.violations])
        if self.json_file is not None:
            write_text(self.json_file, json.dumps(_as_json(report), indent=1) + "\n")
        if report.violations:
            sys.exit(1)


def _checks(report: Report) -> Table:
    history = report.history
    shown = Table(
        title=f"{len(history.events)} events of {len(history.sources)} processes; "
        f"{history.holes} missing, {history.torn} torn lines",
        title_justify="left",
    )
    shown.add_column("rule", justify="right")
    shown.add_column("check")
    shown.add_column("looked at", justify="right")
    shown.add_column("violations", justify="right")
    for check, looked_at in report.looked_at.items():
        broken = sum(violation.check == check for violation in report.violations)
        shown.add_row(str(report.rules[check]), check, str(looked_at), str(broken))
    return shown


def _list(console: Console, violations: list[str]) -> None:
    for violation in violations[:_SHOWN]:
        console.print(violation, highlight=False, soft_wrap=True, markup=False)
    if len(violations) > _SHOWN:
        console.print(f"... and {len(violations) - _SHOWN} more")
    console.print(f"{len(violations)} violations" if violations else "no violation")


def _say(console: Console, result: Result) -> None:
    console.print(
        f"{sum(result.faults.values())} faults of {sum(map(bool, result.faults.values()))} kinds in "
        f"{result.seconds:.0f} s; {result.steps} steps, "
        f"{result.waits} waits, {result.adopted} versions adopted, {result.roots_computed} roots computed "
        f"again, {sum(result.lives.values())} lives of {len(result.lives)} jobs",
        soft_wrap=True,
    )
    _list(console, result.violations)
    for shortfall in result.shortfalls:
        console.print(f"proves too little: {shortfall}", highlight=False, soft_wrap=True)
    if result.folder is not None:
        console.print(f"histories: {result.folder}", highlight=False, soft_wrap=True)


def _as_json(report: Report) -> dict[str, object]:
    return {
        "events": len(report.history.events),
        "missing": report.history.holes,
        "torn": report.history.torn,
        "looked_at": report.looked_at,
        "violations": [
            {
                "rule": violation.rule,
                "check": violation.check,
                "message": violation.message,
                "events": [json.loads(event.line()) for event in violation.events],
            }
            for violation in report.violations
        ],
    }
