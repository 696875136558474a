"""Tokens of jobs at the gRPC calls: who is let in, what each job may have, files that change meanwhile."""

from __future__ import annotations

import grpc
import pytest

from in_process_service import InProcessService
from preconditioner_service import calls, server, sessions, tokens
from raw_trainer import manifest, open_request, statistics, wait_for


def digest(token: str) -> str:
    return tokens.show(tokens.digest(token))


def entry(name: str, *opened_by: str, **more: object) -> str:
    lines = [f"[jobs.{name!r}]", f"tokens = {[digest(token) for token in opened_by]}"]
    return "\n".join([*lines, *(f"{key} = {value}" for key, value in more.items())]) + "\n"


class Jobs:
    def __init__(self, path) -> None:
        self.path = path

    def write(self, *entries: str) -> None:
        new = self.path.with_suffix(".new")
        new.write_text("\n".join([f"status_tokens = ['{digest('watcher')}']", *entries]))
        new.rename(self.path)


@pytest.fixture
def jobs(tmp_path):
    jobs = Jobs(tmp_path / "jobs.toml")
    jobs.write(entry("a", "token-a"), entry("b", "token-b"))
    return jobs


@pytest.fixture
def service(jobs):
    service = InProcessService(jobs_file=jobs.path, max_side=64)
    yield service
    service.stop()


@pytest.fixture
def trainers(service):
    """Makes trainers."""
    made = []

    def make(token: str):
        made.append(service.trainer(token))
        return made[-1]

    yield make
    for trainer in made:
        trainer.channel.close()


def code_of(call) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), caught.value.details()


def test_a_token_opens_its_own_job_alone(trainers):
    a = trainers("token-a")
    a.open(open_request("a", manifest((4,))))
    for job in ("b", "unheard-of"):
        assert code_of(lambda job=job: a.open(open_request(job, manifest((4,))))) == (
            grpc.StatusCode.PERMISSION_DENIED,
            f"the token does not open job {job!r}: use that job's",
        )
    code, _ = code_of(lambda: trainers("token-c").open(open_request("a", manifest((4,)))))
    assert code is grpc.StatusCode.UNAUTHENTICATED
    code, _ = code_of(lambda: trainers("watcher").open(open_request("a", manifest((4,)))))
    assert code is grpc.StatusCode.PERMISSION_DENIED
    code, text = code_of(lambda: a.open(open_request("no name", manifest((4,)))))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "'no name'" in text


def test_another_jobs_session_is_neither_streamed_for_nor_closed(trainers):
    """Even if its id, which nobody can guess, were known."""
    a, b = trainers("token-a"), trainers("token-b")
    opened = a.open(open_request("a", manifest((4,))))
    b.open(open_request("b", manifest((4,))))
    b.opened.session_id = opened.session_id
    stream = b.attach()
    assert stream.code is grpc.StatusCode.PERMISSION_DENIED
    assert code_of(b.close)[0] is grpc.StatusCode.PERMISSION_DENIED
    assert a.attach().attached


def test_the_status_shows_the_callers_jobs(trainers):
    a, b = trainers("token-a"), trainers("token-b")
    a.open(open_request("a", manifest((4,))))
    b.open(open_request("b", manifest((4,))))
    assert [job.job for job in a.status().jobs] == ["a"]
    assert [job.job for job in b.status().jobs] == ["b"]
    assert sorted(job.job for job in trainers("watcher").status().jobs) == ["a", "b"]


def test_rotation_two_tokens_are_good_until_the_old_one_is_revoked(jobs, trainers):
    old = trainers("token-a")
    old.open(open_request("a", manifest((4,))))
    stream = old.attach()
    untouched = trainers("token-b")
    untouched.open(open_request("b", manifest((4,))))
    other = untouched.attach()
    new = trainers("new-a")
    jobs.write(entry("a", "token-a", "new-a"), entry("b", "token-b"))

    def good(trainer) -> bool:
        try:
            return trainer.status().protocol_version_max == 1
        except grpc.RpcError as error:
            return error.code() is not grpc.StatusCode.UNAUTHENTICATED

    wait_for(lambda: good(new))
    stream.snapshot(0, 1, statistics(4))
    stream.until(lambda: stream.receipts)
    assert good(old)

    jobs.write(entry("a", "new-a"), entry("b", "token-b"))
    stream.until(lambda: stream.ended)
    assert (stream.code, stream.details) == (
        grpc.StatusCode.UNAUTHENTICATED,
        "the token is no longer good: use the new one",
    )
    assert not good(old)
    # The session is the job's: the new token takes it up.
    new.opened, new.job, new.manifest, new.epoch = old.opened, old.job, old.manifest, old.epoch
    assert new.attach().attached
    assert not other.ended


def test_a_token_that_opens_other_jobs_only_ends_the_stream_with_permission_denied(jobs, trainers):
    trainer = trainers("token-a")
    trainer.open(open_request("a", manifest((4,))))
    stream = trainer.attach()
    jobs.write(entry("a", "else"), entry("b", "token-a"))
    stream.until(lambda: stream.ended)
    assert stream.code is grpc.StatusCode.PERMISSION_DENIED


def test_a_token_that_is_revoked_while_its_manifest_is_checked_opens_nothing(
    jobs, trainers, service, monkeypatch
):
    class Plan(sessions.Plan):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments)
            jobs.write(entry("a", "new-a"), entry("b", "token-b"))
            service._run._reload(at_once=True)

    monkeypatch.setattr(server, "Plan", Plan)
    trainer = trainers("token-a")
    assert code_of(lambda: trainer.open(open_request("a", manifest((4,))))) == (
        grpc.StatusCode.UNAUTHENTICATED,
        "the token is no longer good: use the new one",
    )
    assert not service._run._board.jobs


def test_a_token_that_is_revoked_while_its_stream_attaches_is_out(jobs, trainers, service, monkeypatch):
    trainer = trainers("token-a")
    trainer.open(open_request("a", manifest((4,))))

    async def answer(context, message, seconds) -> None:
        await calls.answer(context, message, seconds)
        jobs.write(entry("a", "new-a"), entry("b", "token-b"))
        service._run._reload(at_once=True)

    monkeypatch.setattr(server, "answer", answer)
    stream = trainer.attach()
    stream.until(lambda: stream.ended)
    assert stream.code is grpc.StatusCode.UNAUTHENTICATED


def test_a_broken_jobs_file_locks_nobody_out(jobs, trainers, service):
    trainer = trainers("token-a")
    trainer.open(open_request("a", manifest((4,))))
    stream = trainer.attach()
    broken = jobs.path.with_suffix(".broken")  # an empty file, as it is while it is written, would be none
    broken.write_text("[jobs.a")
    broken.replace(jobs.path)
    wait_for(lambda: service._run._access._problem)
    assert trainer.status().jobs
    assert not stream.ended


@pytest.mark.parametrize(
    ("quota", "second", "text"),
    [
        ({"max_sessions": 1}, (4,), "job 'q' would have 2 sessions, allowed are 1 (max_sessions)"),
        ({"max_blocks": 1}, (4,), "job 'q' would have 2 blocks over all ranks, allowed are 1 (max_blocks)"),
        (
            {"max_job_bytes": 200},
            (4,),
            "job 'q' would have 240 bytes of statistics and preconditioners, allowed are 200 (max_job_bytes)",
        ),
        (
            {"max_side": 10},
            (11,),
            "manifest.blocks[0] ('block0'): a side of 11, allowed are 10 (max_side); use smaller blocks",
        ),
    ],
)
def test_quotas_count_all_sessions_of_a_job(jobs, trainers, quota, second, text):
    jobs.write(entry("q", "token-q", **quota), entry("a", "token-a"))
    trainer = trainers("token-q")
    wait_for(lambda: opens(trainer, open_request("q", manifest((4,)), world_size=2)))
    request = open_request("q", manifest(second), world_size=2, rank=1)
    assert code_of(lambda: trainer.open(request)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, text)
    assert opens(trainer, open_request("q", manifest((4,)), world_size=2)), "the same again is no new one"
    assert opens(trainer, open_request("q", manifest((4,)), epoch=2)), "a new epoch ends the old one's"
    a = trainers("token-a")
    for rank in range(3):
        a.open(open_request("a", manifest((4,), (40,)), world_size=3, rank=rank))


def opens(trainer, request) -> bool:
    try:
        trainer.open(request)
    except grpc.RpcError as error:
        if error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
            return False  # the file was not read again yet
        raise
    return True


def test_jobs_of_a_pattern_are_limited_in_number(jobs, trainers):
    jobs.write(entry("team-*", "team", max_jobs=2))
    trainer = trainers("team")
    wait_for(lambda: opens(trainer, open_request("team-1", manifest((4,)))))
    trainer.open(open_request("team-2", manifest((4,))))
    code, text = code_of(lambda: trainer.open(open_request("team-3", manifest((4,)))))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert text == "3 jobs of 'team-*' would be open, allowed are 2 (max_jobs)"
    trainer.close()
    trainer.open(open_request("team-3", manifest((4,))))


def test_weights_and_rates_are_the_files_also_when_it_changes(jobs, trainers, service):
    jobs.write(entry("a", "token-a", weight=3, max_refresh_rate=5), entry("b", "token-b"))
    trainer = trainers("token-a")
    wait_for(lambda: service._run._policy().grant("a").weight == 3)
    trainer.open(open_request("a", manifest((4,))))
    share = service.share("a")
    assert (share.weight, share.max_refresh_rate, share.blocks) == (3.0, 5.0, 1)
    jobs.write(entry("a", "token-a", max_in_flight_seconds=0.5))
    wait_for(lambda: share.weight == 1.0)
    assert share.max_in_flight_seconds == 0.5
    assert share.max_refresh_rate == float("inf")


def test_a_token_file_is_read_again(tmp_path):
    path = tmp_path / "token"
    path.write_text("first\n")
    path.chmod(0o600)
    service = InProcessService(token_file=path)
    try:
        first, second = service.trainer("first"), service.trainer("second")
        first.open(open_request("job", manifest((4,))))
        stream = first.attach()
        path.write_text("second\n")
        stream.until(lambda: stream.ended)
        assert stream.code is grpc.StatusCode.UNAUTHENTICATED
        assert second.status().jobs
        for trainer in (first, second):
            trainer.channel.close()
    finally:
        service.stop()


def test_plaintext_off_loopback_needs_the_flag_that_is_named_for_it(tmp_path):
    path = tmp_path / "token"
    path.write_text("token-of-a-test\n")
    with pytest.raises(ValueError, match="--allow-plaintext"):
        InProcessService(token_file=path, host="0.0.0.0")
    service = InProcessService(token_file=path, host="0.0.0.0", allow_plaintext=True)
    service.stop()
