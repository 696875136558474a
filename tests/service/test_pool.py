"""What the pool does when Ray fails as nobody has foreseen, with a Ray that the test holds in its hand."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from preconditioner_service import pool as pools
from preconditioner_service.pool import PoolError, PoolSettings, RayPool, Worker


class RayError(Exception):
    pass


class ActorDiedError(RayError):
    pass


class Ray:
    """Of one actor; what fails, and how often, is told to it."""

    exceptions = SimpleNamespace(RayError=RayError, ActorDiedError=ActorDiedError)

    def __init__(self) -> None:
        self.failures: list[tuple[str, Exception]] = []
        self.made = self.pings = 0
        self.answers = lambda: True
        """Whether a ping is answered."""
        self.ping = SimpleNamespace(remote=lambda: SimpleNamespace(future=self._ping))

    def _may_fail(self, what: str) -> None:
        if self.failures and self.failures[0][0] == what:
            raise self.failures.pop(0)[1]

    def _ping(self) -> Future[int]:
        self._may_fail("ping")
        self.pings += 1
        answer: Future[int] = Future()
        if self.answers():
            answer.set_result(4711)
        return answer

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 4.0}

    def available_resources(self) -> dict[str, float]:
        return {}

    def kill(self, actor: object, *, no_restart: bool) -> None:
        self._may_fail("kill")

    def make(self) -> Ray:
        self._may_fail("make")
        self.made += 1
        return self


def in_a_pool(scenario, **settings) -> None:
    async def main() -> None:
        ray = Ray()
        pool = RayPool(PoolSettings(num_workers=1, **settings), lambda: None)
        pool._ray, pool._make_actor, pool._start_ray = ray, ray.make, lambda: None
        pool.workers = [Worker(0, ray)]
        try:
            await asyncio.wait_for(scenario(pool, ray), 20)
        finally:
            pool._lost_ray = True  # there is none to end
            await pool.stop()

    asyncio.run(main())


def test_a_worker_comes_back_whatever_goes_wrong_at_its_restart():
    async def scenario(pool: RayPool, ray: Ray) -> None:
        ray.failures = [
            ("kill", ValueError("no such actor")),
            ("ping", OSError("no more files")),
            ("ping", ActorDiedError()),
            ("make", RuntimeError("not now")),
        ]
        pool._revive(pool.workers[0], kill=True)
        while not pool.alive:
            await asyncio.sleep(0.01)
        assert not ray.failures
        assert ray.made == 1

    in_a_pool(scenario)


def test_workers_are_asked_on_although_one_answer_was_an_unforeseen_error(monkeypatch):
    monkeypatch.setattr(pools, "_HEARTBEAT", 0.01)

    async def scenario(pool: RayPool, ray: Ray) -> None:
        pool.workers[0].alive = True
        ray.failures = [("ping", OSError("no more files"))]
        pool._heartbeat = asyncio.create_task(pool._keep_asking())
        while ray.pings < 3:
            await asyncio.sleep(0.01)
        assert pool.alive == 1

    in_a_pool(scenario)


def test_a_worker_that_takes_its_time_is_waited_for_with_news_for_the_operator(monkeypatch, caplog):
    monkeypatch.setattr(pools, "_NEWS_OF_START", 0.05)
    monkeypatch.setattr(pools, "_PING_TIMEOUT", 0.05)

    def news() -> list[str]:
        return [r.fields["why"] for r in caplog.records if r.msg == "waiting for the first worker"]

    async def scenario(pool: RayPool, ray: Ray) -> None:
        ray.answers = lambda: any("last error" in why for why in news())
        await pool.start()
        assert pool.alive == 1

    with caplog.at_level("INFO"):
        in_a_pool(scenario)
    assert news()[-1] == "each needs 1 CPUs, and of Ray's 4 CPUs 0 are free; last error: TimeoutError"


def test_without_a_worker_the_start_fails_with_the_ways_out(monkeypatch):
    monkeypatch.setattr(pools, "_PING_TIMEOUT", 0.05)

    async def scenario(pool: RayPool, ray: Ray) -> None:
        ray.answers = lambda: False
        with pytest.raises(PoolError, match=r"within 0.3 s: each needs 1 CPUs, .*--start-timeout"):
            await pool.start()

    in_a_pool(scenario, start_timeout=0.3)
