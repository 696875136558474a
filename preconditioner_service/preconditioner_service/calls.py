"""How a call begins and how it ends: the wait for its first message, and the statuses that end it.

Until its first message a call costs its caller nothing and the service up to one message of memory, so only
so many may wait at a time. A further one displaces the one that has waited longest, of the host that has most
of them waiting: a trainer sends its first message at once and is never among these, while those who open
calls and send nothing, or trickle, displace one another.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections import Counter
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
import grpc.aio

from preconditioner_service.logs import limited

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class EndOfStream(Exception):
    """The service ends the call with this status."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self.code = code


@dataclass(eq=False, slots=True)
class _Waiting:
    host: str
    displaced: asyncio.Future[None]


class WaitingRoom:
    """Calls whose first message has not come.

    Args:
        most: how many may wait.
        seconds: for how long.
    """

    def __init__(self, most: int, seconds: float) -> None:
        self._most = most
        self._seconds = seconds
        self._waiting: dict[_Waiting, None] = {}
        """In the order of their arrival."""

    def __len__(self) -> int:
        return len(self._waiting)

    async def first_message(self, context: Context) -> bytes:
        """Wait for a call's first message.

        Raises:
            EndOfStream: INVALID_ARGUMENT if it did not come in time or the caller sends none, UNAVAILABLE if
                others took its place.
        """
        self._make_room()
        own = _Waiting(host_of(context.peer()), asyncio.get_running_loop().create_future())
        self._waiting[own] = None
        reading = asyncio.ensure_future(context.read())
        try:
            await asyncio.wait(
                (reading, own.displaced), timeout=self._seconds, return_when=asyncio.FIRST_COMPLETED
            )
            if reading.done():
                data = reading.result()
                if data is grpc.aio.EOF:
                    raise EndOfStream(grpc.StatusCode.INVALID_ARGUMENT, "the call ended without a message")
                assert isinstance(data, bytes)
                return data
            if own.displaced.done():
                limited(logging.WARNING, "call displaced", own.host, host=own.host, waiting=len(self))
                raise EndOfStream(
                    grpc.StatusCode.UNAVAILABLE,
                    f"displaced: {self._most} later calls wait for their first message (max_waiting_calls); "
                    "try again",
                )
            raise EndOfStream(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"no first message within {self._seconds:g} s (first_message_timeout)",
            )
        finally:
            self._waiting.pop(own, None)
            reading.cancel()

    def _make_room(self) -> None:
        if len(self._waiting) < self._most:
            return
        ((greediest, _),) = Counter(call.host for call in self._waiting).most_common(1)
        oldest = next(call for call in self._waiting if call.host == greediest)
        del self._waiting[oldest]
        oldest.displaced.set_result(None)


async def answer(context: Context, message: Any, seconds: float) -> None:
    """Write a message that the caller is waiting for.

    Raises:
        asyncio.CancelledError: it did not take it in time. A caller can announce that it has no room for a
            byte; a status would wait behind the message, and so the call is dropped.
    """
    await _taken(context, context.write(message), seconds)


async def abort(context: Context, end: EndOfStream, seconds: float) -> None:
    """End the call with a status, or drop it if earlier messages that nobody takes keep the status back."""
    await _taken(context, context.abort(end.code, str(end)), seconds)


async def _taken(context: Context, writing: Awaitable[None], seconds: float) -> None:
    try:
        await asyncio.wait_for(writing, seconds)
    except asyncio.TimeoutError:
        host = host_of(context.peer())
        limited(logging.WARNING, "answer not taken", host, host=host, answer_timeout=seconds)
        _drop()
        raise asyncio.CancelledError from None


class _Task(asyncio.Task[Any]):
    """Knows the task that began it."""

    def __init__(self, coroutine: Any, **options: Any) -> None:
        super().__init__(coroutine, **options)
        parent = asyncio.current_task(self.get_loop())
        self.parent = None if parent is None else weakref.ref(parent)


def make_calls_droppable(loop: asyncio.AbstractEventLoop) -> None:
    """Needed once on the loop of a server, or calls that are not taken keep their places."""
    loop.set_task_factory(lambda loop, coroutine, **options: _Task(coroutine, loop=loop, **options))


def _drop() -> None:
    """Have the call that the current task handles reset, with whatever its caller has not taken.

    gRPC for asyncio has no method for it: a call keeps its place among ``maximum_concurrent_rpcs`` until its
    caller took all of it or closed it, also when its handler has ended. But a call that nothing refers to is
    reset; and what refers to it is the task that waits for its end, which began the task of the handler.
    """
    handling = asyncio.current_task()
    parent = handling.parent if isinstance(handling, _Task) else None
    if parent is not None and (waiting := parent()) is not None:
        waiting.cancel()


def host_of(peer: str) -> str:
    """The host of gRPC's ``ipv4:ADDRESS:PORT`` or ``ipv6:[ADDRESS]:PORT``."""
    return peer.rpartition(":")[0]
