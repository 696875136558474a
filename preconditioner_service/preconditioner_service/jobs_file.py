"""The jobs file: tokens, weights and quotas of each job, in TOML.

::

    status_tokens = ["sha256:..."]    # dashboards: they see the status of all jobs and open none

    [jobs.llm-7b]
    tokens = ["sha256:...", "sha256:..."]    # two are good while they are rotated
    weight = 2.0
    max_blocks = 20000

    [jobs."team-a-*"]
    tokens = ["sha256:..."]
    max_jobs = 4

What an entry does not say of quotas is as the service's own settings of the same names say.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from preconditioner_service.mistakes import explain
from preconditioner_service.policy import Grant, Policy
from preconditioner_service.quotas import Quotas
from preconditioner_service.tokens import parse

_NAME = re.compile(r"[A-Za-z0-9._*?-]{1,200}")
_MOST_ENTRIES = 10_000


class JobsFileError(Exception):
    """The jobs file cannot be used; the text names the entry, and shows no token."""


def _job_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError("a job's name is 1 to 200 characters of [A-Za-z0-9._-], and * or ? in a pattern")
    return name


def _checked(text: str) -> str:
    parse(text)
    return text


_Digest = Annotated[str, AfterValidator(_checked)]
_Positive = Annotated[int, Field(ge=1)]
_PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class JobEntry(BaseModel):
    """One job, or the jobs of one pattern."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True, strict=True)

    tokens: list[_Digest] = Field(repr=False)
    weight: Annotated[float, Field(ge=0.001, le=1000)] = 1.0
    max_jobs: _Positive | None = None
    max_sessions: _Positive | None = None
    max_blocks: _Positive | None = None
    max_side: _Positive | None = None
    max_job_bytes: _Positive | None = None
    max_in_flight_seconds: _PositiveFloat | None = None
    max_refresh_rate: _PositiveFloat | None = None


class JobsFile(BaseModel):
    """All of the file."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True, strict=True)

    status_tokens: list[_Digest] = Field(default_factory=list, repr=False)
    jobs: dict[Annotated[str, AfterValidator(_job_name)], JobEntry] = Field(
        default_factory=dict, max_length=_MOST_ENTRIES
    )

    def policy(self, defaults: Quotas) -> Policy:
        """What it says, with the quotas that it does not mention taken from ``defaults``."""
        return Policy(
            (_grant(name, entry, defaults) for name, entry in self.jobs.items()),
            [parse(token) for token in self.status_tokens],
        )


def read_jobs(content: Mapping[str, Any]) -> JobsFile:
    """Check the content of a jobs file.

    Raises:
        JobsFileError: naming every mistake, one sentence each.
    """
    try:
        return JobsFile.model_validate(content)
    except ValidationError as error:
        known = [*JobsFile.model_fields, *JobEntry.model_fields]
        raise JobsFileError(explain(error, known=known)) from None


def _grant(name: str, entry: JobEntry, defaults: Quotas) -> Grant:
    own = entry.model_dump(exclude={"tokens", "weight", "max_jobs"}, exclude_none=True)
    return Grant(
        name=name,
        tokens=tuple(parse(token) for token in entry.tokens),
        weight=entry.weight,
        quotas=replace(defaults, **own),
        max_jobs=entry.max_jobs,
    )
