"""The standard health service. Open to everybody, as probes carry no token, so it holds little for them."""

from __future__ import annotations

import asyncio

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2

from preconditioner_service import wire
from preconditioner_service.calls import Context, EndOfStream, WaitingRoom, answer
from preconditioner_service.decoding import decode
from preconditioner_service.server import SERVICE

_NAMES = ("", SERVICE)


class Health:
    """Answers SERVING or NOT_SERVING: overall, and by the service's name.

    Args:
        max_watchers: calls of Watch at a time; each stays for as long as its caller likes.
        answer_timeout: seconds in which a caller has to take an answer.
    """

    def __init__(self, max_watchers: int, answer_timeout: float) -> None:
        self._max_watchers = max_watchers
        self._answer_timeout = answer_timeout
        self._serving = False
        self._changes: set[asyncio.Event] = set()

    def add_to(self, server: grpc.aio.Server, waiting: WaitingRoom) -> None:
        """Serve it."""
        methods = {
            "Check": wire.unary(self._check, waiting, self._answer_timeout),
            "Watch": wire.stream(self._watch, waiting, self._answer_timeout),
        }
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("grpc.health.v1.Health", methods),)
        )

    def set(self, serving: bool) -> None:
        """Answer SERVING or NOT_SERVING, and tell those who watch."""
        self._serving = serving
        for change in self._changes:
            change.set()

    @property
    def watchers(self) -> int:
        """Calls of Watch."""
        return len(self._changes)

    async def _check(self, data: bytes, context: Context) -> health_pb2.HealthCheckResponse:
        _check_name(data)
        return self._state()

    async def _watch(self, data: bytes, context: Context) -> None:
        # By its specification a watcher of an unknown service stays; there never will be another here.
        _check_name(data)
        if self.watchers >= self._max_watchers:
            raise EndOfStream(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{self._max_watchers} calls watch (max_health_watchers); use Check",
            )
        change = asyncio.Event()
        self._changes.add(change)
        try:
            while True:
                change.clear()
                await answer(context, self._state(), self._answer_timeout)
                await change.wait()
        finally:
            self._changes.discard(change)

    def _state(self) -> health_pb2.HealthCheckResponse:
        states = health_pb2.HealthCheckResponse
        return states(status=states.SERVING if self._serving else states.NOT_SERVING)


def _check_name(data: bytes) -> None:
    if decode(health_pb2.HealthCheckRequest, data).service not in _NAMES:
        raise EndOfStream(grpc.StatusCode.NOT_FOUND, "no such service")
