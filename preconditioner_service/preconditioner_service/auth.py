"""Who may call: one bearer token, checked on every call before anything else is looked at.

The standard health service alone is open, since probes of load balancers and Kubernetes carry no token; it
tells no more than SERVING or NOT_SERVING.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

_OPEN = "/grpc.health.v1.Health/"
_SCHEME = "Bearer "
_MAX_HEADER_BYTES = 4096


def token_matches(header: str | bytes | None, token: str) -> bool:
    """Whether an ``authorization`` header carries this token; takes the same time for every wrong one."""
    if header is None or len(header) > _MAX_HEADER_BYTES:
        return False
    given = header if isinstance(header, bytes) else header.encode("utf-8", "surrogateescape")
    return hmac.compare_digest(given, (_SCHEME + token).encode())


class BearerToken(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Ends calls without the token with UNAUTHENTICATED, whatever their method.

    Args:
        token: the secret.
        refused: called with the method of every refused call, for the log.
    """

    def __init__(self, token: str, refused: Callable[[str], None]) -> None:
        self._token = token
        self._refused = refused

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
        if len(headers) == 1 and token_matches(headers[0], self._token):
            return await continuation(handler_call_details)
        self._refused(method)
        return _refusal("the call carries no token" if not headers else "wrong token")


def _refusal(why: str) -> grpc.RpcMethodHandler:
    async def refuse(_: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await context.abort(
            grpc.StatusCode.UNAUTHENTICATED, f"{why}: send the metadata 'authorization: Bearer TOKEN'"
        )

    # As a handler of streams it answers at once, without waiting for a first message.
    return grpc.stream_stream_rpc_method_handler(refuse)
