"""The standard health service. Open to everybody, as probes carry no token, so it holds little for them."""

from __future__ import annotations

from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio

from preconditioner_service.server import SERVICE

_NAMES = ("", SERVICE)


class Health:
    """Answers SERVING or NOT_SERVING: overall, and by the service's name.

    Args:
        max_watchers: calls of Watch at a time; each stays for as long as its caller likes.
    """

    def __init__(self, max_watchers: int) -> None:
        self._servicer = _Servicer(max_watchers)

    def add_to(self, server: grpc.aio.Server) -> None:
        """Serve it."""
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    async def set(self, serving: bool) -> None:
        """Answer SERVING or NOT_SERVING, and tell those who watch."""
        states = health_pb2.HealthCheckResponse
        for name in _NAMES:
            await self._servicer.set(name, states.SERVING if serving else states.NOT_SERVING)


class _Servicer(health_aio.HealthServicer):  # type: ignore[misc]
    def __init__(self, max_watchers: int) -> None:
        super().__init__()
        self._max_watchers = max_watchers
        self._watchers = 0

    async def Watch(
        self,
        request: health_pb2.HealthCheckRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> None:
        if request.service not in _NAMES:
            # By its specification a watcher of an unknown service stays; there never will be another here.
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service")
        if self._watchers >= self._max_watchers:
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{self._max_watchers} calls watch (max_health_watchers); use Check",
            )
        self._watchers += 1
        try:
            await super().Watch(request, context)
        finally:
            self._watchers -= 1
