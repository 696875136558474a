"""The policy as the settings say it: one token for all jobs, or a jobs file; reloaded when a file changes."""

from __future__ import annotations

from pathlib import Path

from preconditioner_service import jobs_file, toml
from preconditioner_service.files import FileError, read, warn_if_exposed
from preconditioner_service.policy import Grant, Policy
from preconditioner_service.quotas import Quotas
from preconditioner_service.reloading import Reloading
from preconditioner_service.tokens import TokenError, digest, read_tokens


def open_policy(
    *, token: str | None, token_file: Path | None, jobs: Path | None, defaults: Quotas
) -> Reloading[Policy]:
    """The policy of whichever of the three was given.

    Args:
        token: one for all jobs.
        token_file: holds one token a line; each is good for all jobs.
        jobs: see :mod:`preconditioner_service.jobs_file`.
        defaults: quotas of jobs of which the jobs file does not say others.

    Raises:
        FileError: a file cannot be used.
    """
    if jobs is not None:
        return Reloading("jobs file", [jobs], lambda: _of_jobs_file(jobs, defaults))
    if token_file is not None:
        warn_if_exposed(token_file)
        return Reloading("token file", [token_file], lambda: _of_tokens(tokens_of(token_file), defaults))
    assert token is not None
    return Reloading("token", [], lambda: _of_tokens([token], defaults))


def tokens_of(path: Path) -> list[str]:
    """The tokens that a token file holds.

    Raises:
        FileError: it cannot be used.
    """
    data = read(path, "token_file")
    try:
        return read_tokens(data.decode())
    except UnicodeDecodeError:
        raise FileError(f"token_file {path} is not text") from None
    except TokenError as error:
        raise FileError(f"token_file {path} {error}") from None


def _of_tokens(tokens: list[str], quotas: Quotas) -> Policy:
    digests = tuple(digest(token) for token in tokens)
    return Policy([Grant(name="*", tokens=digests, weight=1.0, quotas=quotas)])


def _of_jobs_file(path: Path, defaults: Quotas) -> Policy:
    try:
        content = toml.parse(read(path, "jobs_file"))
        return jobs_file.read_jobs(content).policy(defaults)
    except (toml.TomlError, jobs_file.JobsFileError) as error:
        raise FileError(f"jobs_file {path}: {error}") from None
