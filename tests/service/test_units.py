"""The small ones: log lines, quotas, deadlines, the private Ray's environment, the reaper."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re
import subprocess
import sys

import pytest

from preconditioner_service import logs, reaper, serve
from preconditioner_service.local_ray import RayDirectory, private_environment
from preconditioner_service.pool import deadline
from preconditioner_service.quotas import QuotaError, Quotas, Usage
from preconditioner_service.sessions import MAX_DEPTH, budget_bytes
from preconditioner_service.settings import ServeSettings
from raw_trainer import manifest, wait_for


@pytest.fixture
def log_lines(capsys, monkeypatch):
    # All that is set up is as before when the test has ended: others listen to the same logger.
    monkeypatch.setattr(logs.LOGGER, "propagate", logs.LOGGER.propagate)
    level_before = logs.LOGGER.level
    monkeypatch.setattr(logs.LOGGER, "handlers", [])

    def lines(level: str, log_format: str) -> list[str]:
        logs.set_up(level, log_format)
        logs.event(logging.INFO, "session opened", job="a", client='x" y=1\nforged', event="inner")
        logs.event(logging.DEBUG, "quiet")
        return capsys.readouterr().err.splitlines()

    yield lines
    logs.LOGGER.setLevel(level_before)


def test_text_lines(log_lines):
    (line,) = log_lines("info", "text")
    assert line.endswith(r' INFO session opened job=a client="x\" y=1\nforged" event=inner')
    assert len(log_lines("debug", "text")) == 2


def test_json_lines(log_lines):
    (line,) = log_lines("info", "json")
    entry = json.loads(line)
    assert (entry["event"], entry["level"], entry["job"]) == ("session opened", "info", "a")
    assert entry["client"].endswith("forged")


def test_the_limiter_lets_one_of_a_kind_pass_a_period():
    now = 0.0
    limiter = logs.Limiter(period=10.0, kinds=2, clock=lambda: now)
    assert limiter.passes("a") == 0
    assert [limiter.passes("a") for _ in range(3)] == [None] * 3
    assert limiter.passes("b") == 0
    now = 10.0
    assert limiter.passes("a") == 3
    assert limiter.passes("c") == 0  # "b" is forgotten
    assert limiter.passes("b") == 0


def test_quotas_name_value_limit_and_setting():
    quotas = Quotas(max_sessions=2, max_blocks=2, max_side=10, max_job_bytes=1000)
    quotas.check_size(manifest((1,), (1,)))
    quotas.check_sides(manifest((10,)))
    quotas.check_job("j", Usage(1, 1, 400), Usage(1, 1, 600))
    with pytest.raises(QuotaError, match=r"^manifest.blocks: 3 blocks, allowed are 2 \(max_blocks\)$"):
        quotas.check_size(manifest((1,), (1,), (1,)))
    with pytest.raises(QuotaError, match="snapshots_in_flight"):
        quotas.check_size(manifest((1,), in_flight=MAX_DEPTH + 1))
    with pytest.raises(
        QuotaError, match=r"blocks\[1\].*a side of 11, allowed are 10 \(max_side\); use smaller"
    ):
        quotas.check_sides(manifest((1,), (1, 11)))
    for others, text in (
        (Usage(2, 0, 0), "3 sessions, allowed are 2 (max_sessions)"),
        (Usage(1, 2, 0), "3 blocks over all ranks, allowed are 2 (max_blocks)"),
        (Usage(1, 1, 401), "1001 bytes of statistics and preconditioners, allowed are 1000 (max_job_bytes)"),
    ):
        with pytest.raises(QuotaError, match=re.escape(f"job 'j' would have {text}")):
            quotas.check_job("j", others, Usage(1, 1, 600))


def test_a_budget_counts_all_that_may_be_held():
    # 55 values of 4 bytes: one waits, one is computed, one is kept.
    assert budget_bytes(manifest((10,))) == 3 * 220
    assert budget_bytes(manifest((10,), in_flight=5)) == 11 * 220


def test_deadlines_are_wide():
    assert deadline(0.0, 60.0) == 60
    assert deadline(10.0, 60.0) >= 10 * 10


def test_the_private_environment_forgets_other_rays():
    environment = {"RAY_ADDRESS": "head:6379", "RAY_AUTH_TOKEN": "theirs", "HOME": "/home/me"}
    private_environment(environment, worker_nice=3)
    assert environment["HOME"] == "/home/me"
    assert "RAY_ADDRESS" not in environment
    assert environment["RAY_AUTH_MODE"] == "token"
    assert len(environment["RAY_AUTH_TOKEN"]) >= 32
    assert environment["RAY_AUTH_TOKEN"] != "theirs"
    assert environment["RAY_worker_niceness"] == "3", "Ray adds it to what its workers inherit"


def test_the_reaper_ends_who_holds_files_in_the_directory_and_removes_it():
    directory = RayDirectory()
    assert directory.path.stat().st_mode & 0o777 == 0o700
    with (directory.path / "held").open("w") as held:
        holder = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], stdout=held)
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        wait_for(lambda: holder.pid in reaper.holders(str(directory.path), set()))
        directory.remove()
        assert holder.wait(10) == -9
        assert not directory.path.exists()
        assert other.poll() is None
    finally:
        holder.kill()
        other.kill()
        other.wait()


def test_sockets_of_ray_fit_below_the_directory(monkeypatch, tmp_path):
    deep = tmp_path / ("d" * 60)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    directory = RayDirectory()
    try:
        socket = directory.ray / "session_2026-01-01_00-00-00_000000_1234567" / "sockets" / "plasma_store.1"
        assert len(str(socket)) <= 107
    finally:
        directory.remove()


def test_a_fault_of_a_background_task_drains_and_ends_the_service(monkeypatch):
    async def main() -> None:
        run = serve._Run(ServeSettings(token="token-of-a-test"), io.StringIO())

        async def nothing() -> None:
            pass

        async def fails() -> None:
            raise KeyError("lost")

        monkeypatch.setattr(run, "_watch", lambda: None)
        monkeypatch.setattr(run._pool, "start", nothing)
        monkeypatch.setattr(run._service, "expire_sessions", fails)
        await asyncio.wait_for(run.main(), 20)

    with pytest.raises(serve.ServeError, match="expire sessions: KeyError"):
        asyncio.run(main())
