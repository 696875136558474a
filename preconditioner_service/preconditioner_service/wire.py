"""The service's methods as gRPC handlers that answer bytes which are no message with INVALID_ARGUMENT.

The generated registration lets gRPC fail such calls with UNKNOWN and a traceback in the log, which whoever
holds the token could fill with it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message

from preconditioner_protos.v1 import preconditioner_pb2 as pb
from preconditioner_service.server import SERVICE, Service

MessageT = TypeVar("MessageT", bound=Message)


def add_to(server: grpc.aio.Server, service: Service) -> None:
    """Serve the protocol's four methods."""
    methods = {
        "OpenSession": _unary(service.OpenSession, pb.OpenSessionRequest),
        "CloseSession": _unary(service.CloseSession, pb.CloseSessionRequest),
        "GetStatus": _unary(service.GetStatus, pb.GetStatusRequest),
        "Exchange": grpc.stream_stream_rpc_method_handler(
            service.Exchange,
            request_deserializer=_decoder(pb.TrainerMessage),
            response_serializer=pb.ServiceMessage.SerializeToString,
        ),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))


def _decoder(kind: type[MessageT]) -> Callable[[bytes], MessageT | None]:
    """Decodes, or gives ``None``; streams see to that themselves."""

    def decode(data: bytes) -> MessageT | None:
        try:
            return kind.FromString(data)
        except DecodeError:
            return None

    return decode


def _unary(
    method: Callable[[Any, Any], Awaitable[Message]], kind: type[Message]
) -> grpc.RpcMethodHandler[Any, Any]:
    async def handle(request: Message | None, context: grpc.aio.ServicerContext[Any, Any]) -> Message:
        if request is None:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"the bytes are no {kind.__name__}")
        return await method(request, context)

    return grpc.unary_unary_rpc_method_handler(
        handle,
        request_deserializer=_decoder(kind),
        response_serializer=lambda message: message.SerializeToString(),
    )
