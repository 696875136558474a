"""The pool of Ray actors that compute roots.

Placement, restarts and spreading over hosts are Ray's. What is added here: at most two batches per actor (one
computing, and one queued where the first is short, so that the call's latency is hidden), a deadline for each
batch, and the news of which batch an actor died on.

Calls into Ray may block for milliseconds (large arguments are copied into shared memory), so one thread of
their own makes all of them, in order.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from preconditioner_service.local_ray import NICENESS, RayDirectory, start_private_ray
from preconditioner_service.logs import event, limited
from preconditioner_service.ray_link import check_reachable, node_is_alive, until_lost
from preconditioner_service.root_worker import RootWorker
from preconditioner_service.tasks import RootOutcome, RootTask

T = TypeVar("T")

_HIDES_LATENCY = 0.02
"""Seconds of estimated work up to which an actor takes a second batch behind the first. Behind longer ones
the time of a call does not matter, and a batch that is chosen later holds newer snapshots, and may be that of
another job, which otherwise waits for both."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0
"""Seconds between attempts to reach an actor that is being restarted."""

_NEWS_OF_START = 20.0
"""Seconds after which an operator wants to know what is waited for."""

_PING_TIMEOUT = 30.0
_HEARTBEAT = 5.0
"""Seconds after which a worker without work is asked whether it lives."""

_INLINE_COPY = 256 * 1024


class PoolError(Exception):
    """The pool cannot start; the text names the way out."""


class BatchLostError(Exception):
    """No result will come: the actor died, or did not answer in time.

    Attributes:
        computing: whether the actor worked on this batch then, rather than have it queued or be dead before.
    """

    def __init__(self, why: str, computing: bool) -> None:
        super().__init__(why)
        self.computing = computing


@dataclass(frozen=True, kw_only=True)
class PoolSettings:
    """How the pool is made; see :class:`preconditioner_service.settings.ServeSettings`."""

    num_workers: int
    ray_address: str | None = None
    cpus_per_worker: int = 1
    worker_memory_bytes: int | None = None
    worker_nice: int = 0
    object_store_bytes: int = 256 * 1024 * 1024
    batch_patience: float = 60.0
    start_timeout: float = 180.0


@dataclass(eq=False)
class Worker:
    """One actor as the pool sees it."""

    number: int
    actor: Any
    alive: bool = False
    pid: int = 0
    seen: float = 0.0
    """Monotonic seconds of its last sign of life."""
    batches: deque[_Run] = field(default_factory=deque)

    @property
    def free(self) -> bool:
        """Whether it takes a batch now."""
        if not self.alive or len(self.batches) >= 2:
            return False
        return not self.batches or self.batches[0].seconds <= _HIDES_LATENCY


@dataclass(eq=False)
class _Run:
    seconds: float
    blamed: bool = False


class RayPool:
    """Starts, watches and ends the actors.

    Args:
        settings: how many, where.
        changed: called when a worker came to life, so that it can be given work.
    """

    def __init__(self, settings: PoolSettings, changed: Callable[[], None]) -> None:
        self._settings = settings
        self._changed = changed
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ray")
        self._ray: Any = None
        self._directory: RayDirectory | None = None
        self.workers: list[Worker] = []
        self._make_actor: Callable[[], Any]
        self._node_id = ""
        self._lost_ray = False
        self._heartbeat: asyncio.Task[None] | None = None
        self._revivals: set[asyncio.Task[None]] = set()
        self._last_error = ""

    @property
    def alive(self) -> int:
        """Actors that answer."""
        return sum(worker.alive for worker in self.workers)

    async def start(self) -> None:
        """Start or join Ray, make the actors, and wait for the first of them.

        Raises:
            PoolError: Ray did not start, could not be joined, or no actor lived within `start_timeout`.
        """
        await self._call(self._start_ray)
        first = asyncio.get_running_loop().create_future()
        for worker in self.workers:
            self._revive(worker, first)
        left = self._settings.start_timeout
        while not (await asyncio.wait([first], timeout=min(left, _NEWS_OF_START)))[0]:
            left -= _NEWS_OF_START
            why = await self._call(self._room)
            if left <= 0:
                raise PoolError(
                    f"no worker started within {self._settings.start_timeout:g} s: {why}; make room, lower "
                    "--cpus-per-worker, or raise --start-timeout where the machine is busy or the cluster "
                    "has yet to add a node"
                )
            event(logging.INFO, "waiting for the first worker", why=why)
        self._heartbeat = asyncio.get_running_loop().create_task(self._keep_asking())

    async def until_lost(self) -> str:
        """Return, with the reason, once Ray itself is gone; nothing but :meth:`stop` is of use then."""
        why = await until_lost(lambda: node_is_alive(self._ray, self._node_id))
        self._lost_ray = True
        return why

    def run(
        self, worker: Worker, tasks: Sequence[RootTask], seconds: float
    ) -> Coroutine[Any, Any, list[RootOutcome]]:
        """Have a free worker compute a batch. Its place is taken at once; the work begins when awaited.

        Args:
            worker: its ``free`` is true.
            tasks: the batch.
            seconds: what it is estimated to take.

        Raises:
            BatchLostError: no result will come (when awaited).
        """
        run = _Run(seconds)
        worker.batches.append(run)
        return self._run(worker, run, tasks)

    async def _run(self, worker: Worker, run: _Run, tasks: Sequence[RootTask]) -> list[RootOutcome]:
        allowed = deadline(sum(batch.seconds for batch in worker.batches), self._settings.batch_patience)
        sign: Future[int] | None = None

        def submit() -> Future[list[RootOutcome]]:
            nonlocal sign
            # It comes before the batch: so one that died of the batch is told from one that was dead before.
            if worker.batches[0] is run:
                sign = worker.actor.ping.remote().future()
            return worker.actor.compute.remote(list(tasks)).future()  # type: ignore[no-any-return]

        def computing() -> bool:
            return run.blamed and (sign is None or (sign.done() and sign.exception() is None))

        try:
            future = await self._call(submit)
            outcomes = await asyncio.wait_for(asyncio.wrap_future(future), allowed)
            worker.seen = time.monotonic()
            return await self._own(outcomes)
        except asyncio.TimeoutError:
            self._lost(worker, f"no answer within {allowed:.0f} s", kill=True)
            raise BatchLostError(f"no answer within {allowed:.0f} s", computing()) from None
        except self._ray.exceptions.RayTaskError as error:
            # The actor lives; the computation itself raised, as for want of memory.
            raise BatchLostError(str(error).strip().rpartition("\n")[2], computing=True) from None
        except self._ray.exceptions.RayError as error:
            self._lost(worker, type(error).__name__)
            raise BatchLostError(type(error).__name__, computing()) from None
        finally:
            worker.batches.remove(run)

    async def stop(self) -> None:
        """End the actors, and Ray if it is a private one."""
        for task in (*self._revivals, *([self._heartbeat] if self._heartbeat is not None else [])):
            task.cancel()
        if not self._lost_ray:  # or every call into it hangs
            with contextlib.suppress(Exception):  # it may have died a moment ago; nothing is left to do then
                await self._call(self._end_ray)
        if self._directory is not None:
            await asyncio.to_thread(self._directory.remove)
        self._thread.shutdown(wait=False)

    # In Ray's thread.

    def _start_ray(self) -> None:
        settings = self._settings
        if settings.ray_address is None:
            try:
                self._directory = start_private_ray(
                    settings.num_workers * settings.cpus_per_worker,
                    settings.object_store_bytes,
                    settings.worker_nice,
                )
            except Exception as error:
                raise PoolError(f"a private Ray could not be started: {error}") from error
        else:
            self._join(settings.ray_address)
        import ray

        self._ray = ray
        self._node_id = ray.get_runtime_context().get_node_id()
        options: dict[str, Any] = {"num_cpus": settings.cpus_per_worker}
        if settings.worker_memory_bytes is not None:
            options["memory"] = settings.worker_memory_bytes
        if settings.ray_address is not None:  # a private one has it for all of its workers
            options["runtime_env"] = {"env_vars": {NICENESS: str(settings.worker_nice)}}
        remote = ray.remote(RootWorker).options(max_restarts=-1, scheduling_strategy="SPREAD", **options)
        self._make_actor = lambda: remote.remote(settings.cpus_per_worker)
        self.workers = [Worker(number, self._make_actor()) for number in range(settings.num_workers)]

    def _join(self, address: str) -> None:
        try:
            check_reachable(address)
        except ConnectionError as error:
            raise PoolError(str(error)) from None
        import ray

        logging.getLogger("ray").setLevel(logging.ERROR)
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:
            raise PoolError(
                f"Ray at {address} could not be joined: {error} (a cluster with token "
                "authentication needs RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH here too)"
            ) from error

    def _end_ray(self) -> None:
        if self._ray is None:
            return
        # Actors of a cluster end with their driver; said explicitly, they end at once.
        for worker in self.workers:
            self._ray.kill(worker.actor, no_restart=True)
        self._ray.shutdown()

    def _room(self) -> str:
        cpus = self._ray.cluster_resources().get("CPU", 0)
        free = self._ray.available_resources().get("CPU", 0)
        return (
            f"each needs {self._settings.cpus_per_worker} CPUs, and of Ray's {cpus:.0f} CPUs {free:.0f} are "
            f"free{self._last_error and '; last error: ' + self._last_error}"
        )

    # In the event loop.

    async def _call(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    async def _own(self, outcomes: list[RootOutcome]) -> list[RootOutcome]:
        """Copies of the arrays: they are views of shared memory and would hold all of the batch there."""

        def copy() -> list[RootOutcome]:
            return [
                outcome
                if outcome.sides is None
                else replace(outcome, sides=tuple(side.copy() for side in outcome.sides))
                for outcome in outcomes
            ]

        nbytes = sum(side.nbytes for outcome in outcomes for side in outcome.sides or ())
        return copy() if nbytes <= _INLINE_COPY else await self._call(copy)

    def _lost(self, worker: Worker, why: str, *, kill: bool = False) -> None:
        if not worker.alive:
            return  # told already, by the batch before or behind
        worker.alive = False
        if worker.batches:
            worker.batches[0].blamed = True
        event(logging.WARNING, "worker lost", worker=worker.number, pid=worker.pid, why=why)
        self._revive(worker, kill=kill)

    async def _keep_asking(self) -> None:
        """Workers without work die unnoticed otherwise, and their restart would begin with the next batch."""
        while True:
            await asyncio.sleep(_HEARTBEAT)
            silent = time.monotonic() - _HEARTBEAT
            idle = [w for w in self.workers if w.alive and not w.batches and w.seen < silent]
            await asyncio.gather(*map(self._ask, idle))

    async def _ask(self, worker: Worker) -> None:
        try:
            future: Future[int] = await self._call(lambda: worker.actor.ping.remote().future())
            pid = await asyncio.wait_for(asyncio.wrap_future(future), _PING_TIMEOUT)
            if pid != worker.pid:  # it died without work, and Ray has started it again
                event(logging.WARNING, "worker restarted", worker=worker.number, pid=pid, before=worker.pid)
            worker.pid, worker.seen = pid, time.monotonic()
        except asyncio.TimeoutError:
            if not worker.batches:  # or it works, and has the batch's own deadline
                self._lost(worker, f"no sign of life for {_PING_TIMEOUT:.0f} s", kill=True)
        except Exception as error:  # of Ray's kinds or not: who asks the others must go on
            self._lost(worker, type(error).__name__)

    def _revive(
        self, worker: Worker, first: asyncio.Future[None] | None = None, *, kill: bool = False
    ) -> None:
        task = asyncio.get_running_loop().create_task(self._until_alive(worker, first, kill))
        self._revivals.add(task)
        task.add_done_callback(self._revivals.discard)

    async def _until_alive(self, worker: Worker, first: asyncio.Future[None] | None, kill: bool) -> None:
        pause, dead = _FIRST_PAUSE, False
        while True:
            try:
                if dead:
                    worker.actor = await self._call(self._make_actor)
                elif kill:
                    await self._call(lambda: self._ray.kill(worker.actor, no_restart=False))
                dead = kill = False
                future: Future[int] = await self._call(lambda: worker.actor.ping.remote().future())
                worker.pid = await asyncio.wait_for(asyncio.wrap_future(future), _PING_TIMEOUT)
                break
            except Exception as error:  # of Ray's kinds or not: the worker would be lost for good
                self._last_error = str(error) or type(error).__name__
                # For good, although restarts are unlimited: its constructor failed, or its node left.
                dead = dead or isinstance(error, self._ray.exceptions.ActorDiedError)
                if not isinstance(error, (self._ray.exceptions.RayError, asyncio.TimeoutError)):
                    why = self._last_error
                    limited(
                        logging.WARNING, "worker not reached", worker.number, worker=worker.number, why=why
                    )
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
        worker.alive = True
        worker.seen = time.monotonic()
        event(logging.INFO, "worker ready", worker=worker.number, pid=worker.pid, alive=self.alive)
        if first is not None and not first.done():
            first.set_result(None)
        self._changed()


def deadline(seconds: float, patience: float) -> float:
    """Seconds after which a batch with this estimate is given up: wide, as hosts may be shared."""
    return patience + 20.0 * seconds
