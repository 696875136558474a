"""The jobs file, and the policy that it makes: who opens which jobs, with which quotas."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from preconditioner_service import reloading, tokens
from preconditioner_service.access import open_policy
from preconditioner_service.files import FileError
from preconditioner_service.policy import Caller, Grant, Policy
from preconditioner_service.quotas import QuotaError, Quotas

DEFAULTS = Quotas(max_sessions=10, max_blocks=100, max_side=50, max_job_bytes=1000)


def digest(token: str) -> str:
    return tokens.show(tokens.digest(token))


def policy(tmp_path, text: str) -> Policy:
    path = tmp_path / "jobs.toml"
    path.write_text(text)
    return open_policy(token=None, token_file=None, jobs=path, defaults=DEFAULTS).value


def caller(policy: Policy, token: str) -> Caller:
    found = policy.caller(f"Bearer {token}")
    assert found is not None
    return found


FULL = f"""
status_tokens = ["{digest("watcher")}"]

[jobs.llm-7b]
tokens = ["{digest("old")}", "{digest("new")}"]
weight = 2
max_blocks = 7
max_refresh_rate = 12.5

[jobs."team-a-*"]
tokens = ["{digest("team")}"]
max_jobs = 2

[jobs."team-*"]
tokens = ["{digest("teams")}"]

[jobs.closed]
tokens = []
"""


def test_the_readmes_example_is_one(tmp_path):
    text = (Path(__file__).parents[2] / "preconditioner_service" / "README.md").read_text()
    (example,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    found = policy(tmp_path, example.replace("sha256:...", digest("token")))
    assert found.grant("llm-7b").weight == 2.0
    assert found.grant("llm-7b").quotas.max_refresh_rate == 500
    assert found.grant("team-a-1").max_jobs == 4


def test_what_the_readme_promises_of_time_holds():
    assert 3 * reloading.POLL_SECONDS <= 5


def test_tokens_open_their_jobs_and_no_others(tmp_path):
    found = policy(tmp_path, FULL)
    opens = {
        token: [
            job
            for job in ("llm-7b", "team-a-1", "team-b", "closed", "other")
            if found.opens(caller(found, token), job)
        ]
        for token in ("old", "new", "team", "teams", "watcher")
    }
    assert opens == {
        "old": ["llm-7b"],
        "new": ["llm-7b"],
        "team": ["team-a-1"],
        "teams": ["team-b"],
        "watcher": [],
    }
    assert found.caller("Bearer unknown") is None
    assert found.caller(f"Bearer {digest('old')}") is None, "a digest is no token"


def test_the_status_of_other_jobs_is_not_seen(tmp_path):
    found = policy(tmp_path, FULL)
    assert found.sees(caller(found, "old"), "llm-7b")
    assert not found.sees(caller(found, "old"), "team-b")
    assert found.sees(caller(found, "watcher"), "llm-7b")
    assert found.sees(caller(found, "watcher"), "gone-from-the-file")


def test_quotas_that_are_not_mentioned_are_the_services(tmp_path):
    found = policy(tmp_path, FULL)
    own = found.grant("llm-7b")
    assert (own.weight, own.max_jobs) == (2.0, None)
    assert own.quotas == Quotas(
        max_sessions=10, max_blocks=7, max_side=50, max_job_bytes=1000, max_refresh_rate=12.5
    )
    assert own.quotas.max_in_flight_seconds == math.inf
    assert found.grant("team-b").quotas == DEFAULTS
    assert found.grant("other") is None
    assert found.most_blocks == 100


def test_jobs_of_a_pattern_are_counted(tmp_path):
    grant = policy(tmp_path, FULL).grant("team-a-1")
    grant.check_jobs("team-a-1", ["team-a-1", "team-a-2", "llm-7b"])
    with pytest.raises(QuotaError, match=r"3 jobs of 'team-a-\*' would be open, allowed are 2 \(max_jobs\)"):
        grant.check_jobs("team-a-3", ["team-a-1", "team-a-2"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[jobs.a]\n", r"jobs\.a\.tokens: Field required"),
        ("[jobs.a]\ntokens = ['plain-secret']\n", r"jobs\.a\.tokens\.0: .*64 hexadecimal digits"),
        ("[jobs.a]\ntokens = []\nwieght = 2\n", r"jobs\.a\.wieght: unknown setting"),
        ("[jobs.a]\ntokens = []\nweight = 0\n", r"jobs\.a\.weight"),
        ("[jobs.a]\ntokens = []\nmax_blocks = '7'\n", r"jobs\.a\.max_blocks"),
        ("[jobs.a]\ntokens = []\nmax_refresh_rate = inf\n", r"jobs\.a\.max_refresh_rate"),
        ("[jobs.'a b']\ntokens = []\n", "a job's name is"),
        ("[job.a]\ntokens = []\n", "job: unknown setting"),
        ("status_tokens = ['plain-secret']\n", r"status_tokens\.0"),
        ("[jobs", "Expected ']'"),
    ],
)
def test_mistakes_are_named_without_the_values(tmp_path, text, message):
    with pytest.raises(FileError, match=message) as caught:
        policy(tmp_path, text)
    assert "jobs.toml" in str(caught.value)
    assert "plain-secret" not in str(caught.value)


def test_nothing_shows_a_digest(tmp_path):
    found = policy(tmp_path, FULL)
    shown = repr(found.grant("llm-7b")) + repr(caller(found, "old"))
    assert tokens.digest("old").hex() not in shown
    assert repr(tokens.digest("old")) not in shown


def test_a_token_file_opens_all_jobs_with_each_of_its_tokens(tmp_path):
    path = tmp_path / "token"
    path.write_text("one\ntwo\n")
    found = open_policy(token=None, token_file=path, jobs=None, defaults=DEFAULTS).value
    for token in ("one", "two"):
        assert found.opens(caller(found, token), "whatever")
    assert found.grant("whatever") == Grant(
        name="*", tokens=found.grant("x").tokens, weight=1.0, quotas=DEFAULTS
    )
