"""How many calls may begin a second, held to where a call that was reset meanwhile costs next to nothing.

To begin a call takes the event loop a quarter of a millisecond, before any code of ours can refuse it.
Whoever opens calls and resets them at once, some thousands a second, has the loop to itself, and no limit of
calls at a time is in its way. gRPC's core, though, keeps calls that the loop has not asked for, and drops
those that are reset meanwhile. So the loop asks for no more than it should begin; a call that its caller
waits for begins when those before it have.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Generator
from types import coroutine
from typing import Any

from preconditioner_service.logs import event

_ACCEPTING = "AioServer._server_main_loop"
"""The coroutine of gRPC's for asyncio that takes call after call; it offers nothing to slow that down."""


class Arrivals:
    """A token bucket of calls; it holds those of one second.

    Args:
        rate: calls a second.
        clock: monotonic seconds.
    """

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._most = max(rate, 1.0)
        self._tokens = self._most
        self._clock = clock
        self._at = clock()

    def take(self) -> float:
        """Count a call.

        Returns:
            Seconds that it has to wait.
        """
        now = self._clock()
        self._tokens = min(self._tokens + (now - self._at) * self._rate, self._most) - 1
        self._at = now
        return max(-self._tokens / self._rate, 0.0)


def pace_arrivals(loop: asyncio.AbstractEventLoop, arrivals: Arrivals) -> Callable[[], None]:
    """Have the server that is started next on the loop take calls as fast as this lets it.

    Returns:
        What to call once the server has started: it logs a warning if nothing slows it down.
    """
    before = loop.get_task_factory()
    usual = before or _task

    def make(loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> asyncio.Future[Any]:
        if getattr(work, "__qualname__", None) == _ACCEPTING:
            loop.set_task_factory(before)
            work = _paced(work, arrivals)
        return usual(loop, work, **options)

    def started() -> None:
        if loop.get_task_factory() is make:
            loop.set_task_factory(before)
            event(logging.WARNING, "max_call_rate is not held", why=f"this grpcio has no {_ACCEPTING}")

    loop.set_task_factory(make)
    return started


def _task(loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> asyncio.Future[Any]:
    return asyncio.Task(work, loop=loop, **options)


async def _paced(accepting: Coroutine[Any, Any, Any], arrivals: Arrivals) -> Any:
    return await _steps(accepting, arrivals)


@coroutine
def _steps(accepting: Coroutine[Any, Any, Any], arrivals: Arrivals) -> Generator[Any, Any, Any]:
    """Its steps, each of which begins the call that it waited for, with the pauses between them."""
    thrown: BaseException | None = None
    while True:
        try:
            waits_for = accepting.send(None) if thrown is None else accepting.throw(thrown)
        except StopIteration as end:
            return end.value
        thrown = None
        try:
            yield waits_for
            if (wait := arrivals.take()) > 0:
                yield from asyncio.sleep(wait).__await__()
        except BaseException as error:  # cancelled, or nothing came: that is for gRPC to see
            thrown = error
