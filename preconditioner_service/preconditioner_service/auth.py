"""Authentication of every call by its bearer token, before anything else of it is looked at.

The standard health service alone is open, since probes of load balancers and Kubernetes carry no token; it
tells no more than SERVING or NOT_SERVING. What a token opens is checked by the calls themselves, with
:func:`current_caller`.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

import grpc
import grpc.aio

from preconditioner_service.calls import host_of
from preconditioner_service.logs import limited
from preconditioner_service.policy import Caller, Policy

_OPEN = "/grpc.health.v1.Health/"

_HOST_GROUPS = 16
"""Of strangers, for the log: one does not hide the others, and however many they are, the lines stay few."""

_caller: ContextVar[Caller] = ContextVar("caller")


def current_caller() -> Caller:
    """Who makes the call that the current task handles."""
    return _caller.get()


class BearerToken(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Ends calls without a good token with UNAUTHENTICATED, whatever their method.

    Args:
        policy: as it is now.
    """

    def __init__(self, policy: Callable[[], Policy]) -> None:
        self._policy = policy

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """Let the call pass, or put a handler that refuses in its place."""
        method: str = handler_call_details.method
        if method.startswith(_OPEN):
            return await continuation(handler_call_details)
        headers = [value for key, value in handler_call_details.invocation_metadata if key == "authorization"]
        caller = self._policy().caller(headers[0]) if len(headers) == 1 else None
        if caller is None:
            return _refusal(method, "the call carries no token" if not headers else "wrong token")
        _caller.set(caller)  # the handler runs in this very task
        return await continuation(handler_call_details)


def _refusal(method: str, why: str) -> grpc.RpcMethodHandler:
    async def refuse(_: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        log_refused(method, context.peer())
        await context.abort(
            grpc.StatusCode.UNAUTHENTICATED, f"{why}: send the metadata 'authorization: Bearer TOKEN'"
        )

    # As a handler of streams it answers at once, without waiting for a first message.
    return grpc.stream_stream_rpc_method_handler(refuse)


def log_refused(method: str, peer: str) -> None:
    """Log a call of a stranger, of whom there may be very many."""
    group = zlib.crc32(host_of(peer).encode()) % _HOST_GROUPS
    limited(logging.WARNING, "unauthenticated", group, peer=peer, method=method[:100])
