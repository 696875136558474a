"""The service's methods as gRPC handlers of bytes, and the transport's own limits.

The generated registration would parse whatever comes before the service sees it, and let gRPC fail bytes that
are no message with UNKNOWN and a traceback in the log, which whoever holds the token could fill with it. On
the wire a unary call is a stream of one message, and as such it is handled here, so that a first message that
never comes holds nothing for long (see :mod:`preconditioner_service.calls`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import Message

from preconditioner_protos.v1 import preconditioner_pb2 as pb
from preconditioner_service.calls import Context, EndOfStream, WaitingRoom, abort, answer
from preconditioner_service.decoding import decode
from preconditioner_service.server import SERVICE, Service
from preconditioner_service.settings import ServeSettings


def add_to(server: grpc.aio.Server, service: Service, waiting: WaitingRoom) -> None:
    """Serve the protocol's four methods."""

    async def close(data: bytes, context: Context) -> Message:
        return await service.CloseSession(decode(pb.CloseSessionRequest, data), context)

    async def status(data: bytes, context: Context) -> Message:
        return await service.GetStatus(decode(pb.GetStatusRequest, data), context)

    seconds = service.limits.answer_timeout
    methods = {
        "OpenSession": unary(service.OpenSession, waiting, seconds),
        "CloseSession": unary(close, waiting, seconds),
        "GetStatus": unary(status, waiting, seconds),
        "Exchange": stream(service.Exchange, waiting, seconds),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))


def unary(
    method: Callable[[bytes, Context], Awaitable[Message]], waiting: WaitingRoom, seconds: float
) -> grpc.RpcMethodHandler[Any, Any]:
    """A handler of calls with one message and one answer, which is taken within so many seconds."""

    async def handle(data: bytes, context: Context) -> None:
        await answer(context, await method(data, context), seconds)

    return stream(handle, waiting, seconds)


def stream(
    method: Callable[[bytes, Context], Awaitable[None]], waiting: WaitingRoom, seconds: float
) -> grpc.RpcMethodHandler[Any, Any]:
    """A handler of calls that begin with a message; ``EndOfStream`` becomes their status."""

    async def handle(_: Any, context: Context) -> None:
        try:
            await method(await waiting.first_message(context), context)
        except EndOfStream as end:
            await abort(context, end, seconds)

    return grpc.stream_stream_rpc_method_handler(
        handle, response_serializer=lambda message: message.SerializeToString()
    )


def channel_options(settings: ServeSettings) -> list[tuple[str, int]]:
    """What gRPC itself holds connections and calls to, before any of our code runs."""
    return [
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_send_message_length", settings.max_message_bytes),
        # Two services must never share a port, and so each other's calls.
        ("grpc.so_reuseport", 0),
        # Dead peers are found within half a minute; clients may ping every five seconds.
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.ping_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.http2.max_ping_strikes", 3),
        ("grpc.max_concurrent_streams", settings.max_streams_per_connection),
        ("grpc.max_allowed_incoming_connections", settings.max_connections),
        # Calls that wait to begin: each connection may have one, and none could fill the memory with them.
        ("grpc.server.max_pending_requests", settings.max_connections),
        ("grpc.server.max_pending_requests_hard_limit", settings.max_connections * 3 // 2),
        ("grpc.server_handshake_timeout_ms", _milliseconds(settings.handshake_timeout)),
        ("grpc.max_connection_idle_ms", _milliseconds(settings.connection_idle_timeout)),
        # Above the first it refuses some, above the second all: one bound is easier to reckon with.
        ("grpc.max_metadata_size", settings.max_metadata_bytes),
        ("grpc.absolute_max_metadata_size", settings.max_metadata_bytes),
        # Identity alone: a compressed message may unpack to a thousand times its size.
        ("grpc.compression_enabled_algorithms_bitset", 1),
    ]


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))
