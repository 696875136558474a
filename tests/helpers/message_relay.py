"""A gRPC relay between a trainer and a service, in the process of the test, that changes what passes."""

from __future__ import annotations

import contextlib
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import TypeVar

import grpc
import numpy as np

from preconditioner_protos.v1 import preconditioner_pb2 as pb
from preconditioner_protos.v1 import preconditioner_pb2_grpc as rpc

Message = TypeVar("Message", pb.TrainerMessage, pb.ServiceMessage)
Mutation = Callable[[Message], Iterable[Message]]


class MessageRelay:
    """Forwards every call to the service at ``upstream``.

    Attributes:
        address: where trainers connect.
        up: what a trainer's message becomes; may be set at any time.
        down: what a service's message becomes.
        changed: messages that did not pass as they were.
        nacks: that the service sent.
    """

    def __init__(self, upstream: str) -> None:
        self._channel = grpc.insecure_channel(upstream)
        self._upstream = rpc.PreconditionerServiceStub(self._channel)
        self._server = grpc.server(futures.ThreadPoolExecutor(16))
        rpc.add_PreconditionerServiceServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._guard = threading.Lock()
        self.heal()
        self._server.start()

    def heal(self) -> None:
        """Let everything pass as it is."""
        with self._guard:
            self.up: Mutation[pb.TrainerMessage] = lambda message: [message]
            self.down: Mutation[pb.ServiceMessage] = lambda message: [message]
            self.changed = 0
            self.nacks: list[pb.Nack] = []

    def OpenSession(self, request, context):
        return self._unary(self._upstream.OpenSession, request, context)

    def CloseSession(self, request, context):
        return self._unary(self._upstream.CloseSession, request, context)

    def GetStatus(self, request, context):
        return self._unary(self._upstream.GetStatus, request, context)

    def Exchange(self, requests, context):
        call = self._upstream.Exchange(self._up(requests), metadata=_authorization(context))
        context.add_callback(call.cancel)
        try:
            yield from self._passed(call, lambda message: self.down(message))
        except grpc.RpcError as error:
            context.abort(error.code(), error.details())

    def _unary(self, method, request, context):
        try:
            return method(request, metadata=_authorization(context), timeout=30)
        except grpc.RpcError as error:
            context.abort(error.code(), error.details())

    def _up(self, requests: Iterable[pb.TrainerMessage]) -> Iterator[pb.TrainerMessage]:
        with contextlib.suppress(grpc.RpcError):  # the trainer is gone
            yield from self._passed(requests, lambda message: self.up(message))

    def _passed(self, messages: Iterable[Message], mutation: Mutation[Message]) -> Iterator[Message]:
        for message in messages:
            with self._guard:
                first = message.WhichOneof("kind") in ("attach", "attached")
                if message.WhichOneof("kind") == "nacks":
                    self.nacks += message.nacks.nacks
                passed = [message] if first else list(mutation(message))
                self.changed += passed != [message]
            yield from passed

    def close(self) -> None:
        self._server.stop(0).wait(10)
        self._channel.close()

    def __enter__(self) -> MessageRelay:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _authorization(context: grpc.ServicerContext) -> list[tuple[str, str]]:
    return [(key, value) for key, value in context.invocation_metadata() if key == "authorization"]


# -- mutations ---------------------------------------------------------------------------------------


def of_chunks(change: Callable[[list[pb.MatrixChunk]], Iterable[pb.MatrixChunk]]) -> Mutation[Message]:
    """Changes the chunks of a message; leaves other messages alone."""

    def mutation(message: Message) -> Iterable[Message]:
        if message.WhichOneof("kind") != "chunks":
            return [message]
        return [type(message)(chunks=pb.Chunks(chunks=change(list(message.chunks.chunks))))]

    return mutation


def of_each_chunk(change: Callable[[pb.MatrixChunk], None]) -> Mutation[Message]:
    """Changes each chunk in place."""

    def changed(chunks: list[pb.MatrixChunk]) -> Iterable[pb.MatrixChunk]:
        for chunk in chunks:
            copy = pb.MatrixChunk()
            copy.CopyFrom(chunk)
            change(copy)
            yield copy

    return of_chunks(changed)


def duplicated(message: Message) -> Iterable[Message]:
    """Every message twice: chunks, receipts, Nacks."""
    return [message, message]


def split(chunk: pb.MatrixChunk) -> list[pb.MatrixChunk]:
    """A chunk as two of half the size, where it can be cut."""
    middle = len(chunk.payload) // 2
    if middle == 0:
        return [chunk]
    first, second = pb.MatrixChunk(), pb.MatrixChunk()
    for part in (first, second):
        part.CopyFrom(chunk)
    first.payload, second.payload = chunk.payload[:middle], chunk.payload[middle:]
    second.offset += middle
    return [first, second]


def reordered(chunks: list[pb.MatrixChunk]) -> Iterable[pb.MatrixChunk]:
    """Each matrix in two chunks, the later one first."""
    return [part for chunk in chunks for part in reversed(split(chunk))]


def contradictory(chunks: list[pb.MatrixChunk]) -> Iterable[pb.MatrixChunk]:
    """Each matrix in two chunks that announce different checksums."""
    for chunk in chunks:
        first, *rest = split(chunk)
        first.crc32 ^= 1
        yield from (first, *rest)


def truncated(chunk: pb.MatrixChunk) -> None:
    """The last byte is missing."""
    chunk.payload = chunk.payload[:-1]


def bit_flipped(chunk: pb.MatrixChunk) -> None:
    """One bit in the middle."""
    payload = bytearray(chunk.payload)
    payload[len(payload) // 2] ^= 0x10
    chunk.payload = bytes(payload)


def with_value(value: float, block: int) -> Callable[[pb.MatrixChunk], None]:
    """The first value of each of a block's matrices becomes this one, with a checksum that fits."""

    def change(chunk: pb.MatrixChunk) -> None:
        if chunk.block == block and chunk.offset == 0:
            values = np.frombuffer(chunk.payload, "<f4").copy()
            values[0] = value
            chunk.payload = values.tobytes()
            chunk.crc32 = zlib.crc32(chunk.payload)

    return change
