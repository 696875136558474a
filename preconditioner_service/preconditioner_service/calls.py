"""How a call begins and how it ends: the wait for its first message, and the statuses that end it.

Until its first message a call costs its caller nothing and the service up to one message of memory, so only
so many may wait at a time. A further one displaces the one that has waited longest, of the host that has most
of them waiting: a trainer sends its first message at once and is never among these, while those who open
calls and send nothing, or trickle, displace one another.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
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
            byte; a status would wait behind the message, and the call's place with it.
    """
    try:
        await asyncio.wait_for(context.write(message), seconds)
    except asyncio.TimeoutError:
        host = host_of(context.peer())
        limited(logging.WARNING, "answer not taken", host, host=host, answer_timeout=seconds)
        raise asyncio.CancelledError from None


def host_of(peer: str) -> str:
    """The host of gRPC's ``ipv4:ADDRESS:PORT`` or ``ipv6:[ADDRESS]:PORT``."""
    return peer.rpartition(":")[0]
