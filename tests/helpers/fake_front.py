"""A front in the test's own process that speaks the protocol and misbehaves on demand."""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures

import grpc
import numpy as np

from preconditioner_protos import Assembler, Layout, PackedBlock, Refusal, chunk_messages, pack, unpack
from preconditioner_protos.v1 import preconditioner_pb2 as pb
from preconditioner_protos.v1 import preconditioner_pb2_grpc as rpc


def until(condition: Callable[[], object], timeout: float = 15.0, what: str = "") -> None:
    """Wait until a condition holds; fail after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout} s: {what or condition}")
        time.sleep(0.003)


def roots(block: PackedBlock, manifest: pb.Manifest) -> PackedBlock:
    """(A + value I)^(-1/p) of every side, in float64, packed as float32."""
    spec = manifest.blocks[block.block]
    sides = []
    for packed, side in zip(block.sides, spec.sides, strict=True):
        values, vectors = np.linalg.eigh(unpack(packed.astype(np.float64), side.length))
        powers = (np.maximum(values, 0) + spec.ridge.value) ** (-1 / side.root_order)
        sides.append(pack((vectors * powers) @ vectors.T).astype("<f4"))
    return PackedBlock(block.block, block.step, tuple(sides))


class FrontStream:
    """One attached stream, as the front sees it."""

    def __init__(self, front: FakeFront, attach: pb.Attach, request: pb.OpenSessionRequest) -> None:
        self.attach = attach
        self.manifest = request.manifest
        self.snapshots: list[PackedBlock] = []
        self.refusals: list[Refusal] = []
        self.receipts: list[tuple[int, int]] = []
        self.half_closed = threading.Event()
        self.over = threading.Event()
        self.largest_message = 0
        self.receipt_messages = 0
        self._front = front
        self._assembler = Assembler(Layout.of_statistics(self.manifest))
        self._out: queue.Queue[pb.ServiceMessage | tuple[grpc.StatusCode, str]] = queue.Queue()

    def send(self, **kind: object) -> None:
        """Send one message: ``send(receipts=...)``."""
        self._out.put(pb.ServiceMessage(**kind))

    def push(self, *blocks: PackedBlock) -> None:
        """Send preconditioners."""
        for chunks in chunk_messages(blocks, message=pb.Chunks):
            self.send(chunks=chunks)

    def receipt(self, block: PackedBlock) -> None:
        """Acknowledge a snapshot."""
        self.send(receipts=pb.Receipts(receipts=[pb.Receipt(block=block.block, step=block.step)]))

    def nack(self, block: int, step: int, reason: pb.NackReason, on_arrival: bool, detail: str = "") -> None:
        """Refuse a snapshot."""
        nack = pb.Nack(block=block, step=step, reason=reason, detail=detail, on_arrival=on_arrival)
        self.send(nacks=pb.Nacks(nacks=[nack]))

    def end(self, code: grpc.StatusCode, details: str = "on demand") -> None:
        """End the stream once all before is sent."""
        self._out.put((code, details))

    def messages(self) -> Iterator[pb.ServiceMessage | tuple[grpc.StatusCode, str]]:
        """What to send."""
        while True:
            yield self._out.get()

    def read(self, requests: Iterator[pb.TrainerMessage]) -> None:
        """Take what the trainer sends until it half-closes."""
        with contextlib.suppress(grpc.RpcError, Exception):
            while True:
                self._front.reading.wait()
                message = next(requests, None)
                if message is None:
                    break
                self.largest_message = max(self.largest_message, message.ByteSize())
                for chunk in message.chunks.chunks:
                    for outcome in self._assembler.add(chunk):
                        if isinstance(outcome, Refusal):
                            self.refusals.append(outcome)
                        else:
                            self.snapshots.append(outcome)
                            self._front.on_snapshot(self, outcome)
                self.receipt_messages += message.HasField("receipts")
                self.receipts += [(r.block, r.step) for r in message.receipts.receipts]
            self.half_closed.set()
        self.end(grpc.StatusCode.OK)


def answer(stream: FrontStream, block: PackedBlock) -> None:
    """The well-behaved front: receipt, then roots."""
    stream.receipt(block)
    stream.push(roots(block, stream.manifest))


class FakeFront(rpc.PreconditionerServiceServicer):
    """A front on loopback. Its attributes may be set at any time."""

    def __init__(self, port: int = 0, credentials: grpc.ServerCredentials | None = None) -> None:
        self.token: str | None = None
        self.protocol_version = 1
        self.jobs: list[pb.JobStatus] = []
        self.open_error: tuple[grpc.StatusCode, str] | None = None
        self.attach_error: tuple[grpc.StatusCode, str] | None = None
        self.mute = False  # accepts Attach and never answers it
        self.fronts: Sequence[pb.Front] = [pb.Front()]
        self.limits = pb.Limits(max_message_bytes=4 * 2**20, credit_bytes=64 * 2**20, session_ttl_seconds=60)
        self.on_snapshot: Callable[[FrontStream, PackedBlock], None] = answer
        self.reading = threading.Event()
        self.reading.set()
        self.opens: list[pb.OpenSessionRequest] = []
        self.closed: list[str] = []
        self.streams: list[FrontStream] = []
        self.attaches = 0
        self._sessions: dict[str, pb.OpenSessionRequest] = {}
        self._numbers = itertools.count()
        self._pool = futures.ThreadPoolExecutor(16)
        self._server = grpc.server(self._pool, options=[("grpc.so_reuseport", 0)])
        rpc.add_PreconditionerServiceServicer_to_server(self, self._server)
        name = f"127.0.0.1:{port}"
        if credentials is None:
            self.port = self._server.add_insecure_port(name)
        else:
            self.port = self._server.add_secure_port(name, credentials)
        self.address = f"127.0.0.1:{self.port}"
        self._server.start()

    @property
    def stream(self) -> FrontStream:
        """The latest attached stream."""
        return self.streams[-1]

    def stop(self) -> None:
        """Stop at once, as if killed."""
        self.open_error = self.attach_error = (grpc.StatusCode.UNAVAILABLE, "stopped")
        self.reading.set()
        for stream in self.streams:
            stream.end(grpc.StatusCode.UNAVAILABLE)
        self._server.stop(None).wait()
        self._pool.shutdown(wait=False)

    def forget_sessions(self) -> None:
        """As a restart does."""
        self._sessions.clear()

    def _authenticate(self, context: grpc.ServicerContext) -> None:
        given = dict(context.invocation_metadata()).get("authorization")
        if self.token is not None and given != f"Bearer {self.token}":
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "wrong token" if given else "no token")

    def GetStatus(self, request, context):
        self._authenticate(context)
        version = self.protocol_version
        return pb.GetStatusResponse(
            protocol_version_min=version, protocol_version_max=version, jobs=self.jobs
        )

    def OpenSession(self, request, context):
        self._authenticate(context)
        if self.open_error is not None:
            context.abort(*self.open_error)
        self.opens.append(request)
        session_id = next((i for i, r in self._sessions.items() if r == request), f"s{next(self._numbers)}")
        self._sessions[session_id] = request
        return pb.OpenSessionResponse(
            session_id=session_id,
            protocol_version=self.protocol_version,
            placement=pb.Placement(revision=1, fronts=self.fronts),
            limits=self.limits,
        )

    def CloseSession(self, request, context):
        self._authenticate(context)
        self.closed.append(request.session_id)
        self._sessions.pop(request.session_id, None)
        return pb.CloseSessionResponse()

    def Exchange(self, requests, context):
        self._authenticate(context)
        attach = next(requests).attach
        self.attaches += 1
        if self.attach_error is not None:
            context.abort(*self.attach_error)
        if attach.session_id not in self._sessions:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "unknown session")
        stream = FrontStream(self, attach, self._sessions[attach.session_id])
        context.add_callback(lambda: stream.end(grpc.StatusCode.CANCELLED))
        threading.Thread(target=stream.read, args=(requests,), daemon=True).start()
        if not self.mute:
            self.streams.append(stream)
            yield pb.ServiceMessage(attached=pb.Attached(epoch=attach.epoch))
        for message in stream.messages():
            if isinstance(message, tuple):
                stream.over.set()
                if message[0] is not grpc.StatusCode.OK and context.is_active():
                    context.abort(*message)
                return
            yield message


def versions(front: FakeFront) -> list[tuple[int, int]]:
    """(block, step) of every snapshot that came, in order."""
    return [(s.block, s.step) for stream in front.streams for s in stream.snapshots]
