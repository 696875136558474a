"""Who may call, for which jobs, and what each job may have. Immutable: a reload makes a new one."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass, field

from preconditioner_service import tokens
from preconditioner_service.quotas import QuotaError, Quotas


@dataclass(frozen=True, kw_only=True)
class Grant:
    """An entry of the jobs file: which jobs it is for, which tokens open them, and what each may have.

    Attributes:
        name: of a job, or a pattern with ``*`` and ``?``.
        tokens: digests of the tokens that open them; any is good.
        weight: of each job between busy ones.
        quotas: of each job.
        max_jobs: jobs of a pattern that may be open at a time; ``None``: any number.
    """

    name: str
    tokens: tuple[bytes, ...] = field(repr=False)
    weight: float
    quotas: Quotas
    max_jobs: int | None = None

    @property
    def is_pattern(self) -> bool:
        """Whether it is for more than one job."""
        return "*" in self.name or "?" in self.name

    def matches(self, job: str) -> bool:
        """Whether it is for this job, if no other one is."""
        return fnmatch.fnmatchcase(job, self.name)

    def check_jobs(self, job: str, others: Iterable[str]) -> None:
        """Hold the number of jobs that would be open with one more against ``max_jobs``.

        Args:
            job: the one more, or one of them.
            others: names of jobs that are open.

        Raises:
            QuotaError: too many.
        """
        if self.max_jobs is None:
            return
        names = {job, *(other for other in others if self.matches(other))}
        if len(names) > self.max_jobs:
            raise QuotaError(
                f"{len(names)} jobs of {self.name!r} would be open, allowed are {self.max_jobs} (max_jobs)"
            )


@dataclass(frozen=True)
class Caller:
    """Who makes a call: the holder of a token that was good when the call began.

    Attributes:
        token: its digest.
    """

    token: bytes = field(repr=False)


class Policy:
    """All grants.

    Args:
        grants: a job's is the one with its very name, else the first whose pattern matches.
        status_tokens: digests of tokens that see the status of all jobs and open none.

    Attributes:
        most_blocks: that any job may have.
    """

    def __init__(self, grants: Iterable[Grant], status_tokens: Iterable[bytes] = ()) -> None:
        listed = list(grants)
        self._exact = {grant.name: grant for grant in listed if not grant.is_pattern}
        self._patterns = [grant for grant in listed if grant.is_pattern]
        self._status_tokens = tuple(status_tokens)
        of_jobs = (token for grant in listed for token in grant.tokens)
        self._known = tuple(dict.fromkeys([*of_jobs, *self._status_tokens]))
        self.most_blocks = max((grant.quotas.max_blocks for grant in listed), default=0)

    def caller(self, header: str | bytes) -> Caller | None:
        """Who calls with this ``authorization`` header; ``None`` if its token is not known."""
        given = tokens.of_header(header)
        if given is None or not tokens.is_among(given, self._known):
            return None
        return Caller(given)

    def knows(self, caller: Caller) -> bool:
        """Whether the caller's token is still good for anything."""
        return tokens.is_among(caller.token, self._known)

    def grant(self, job: str) -> Grant | None:
        """What governs a job; ``None`` if nobody may open it."""
        exact = self._exact.get(job)
        if exact is not None:
            return exact
        return next((grant for grant in self._patterns if grant.matches(job)), None)

    def opens(self, caller: Caller, job: str) -> bool:
        """Whether the caller may open the job, stream for it and close its sessions."""
        grant = self.grant(job)
        return grant is not None and tokens.is_among(caller.token, grant.tokens)

    def sees(self, caller: Caller, job: str) -> bool:
        """Whether the caller may know of the job."""
        return tokens.is_among(caller.token, self._status_tokens) or self.opens(caller, job)
