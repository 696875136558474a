"""Messages for the handlers that no trainer sends: valid ones with fields, order or bytes changed, and noise.

The strategies are hypothesis'; :class:`Handlers` drives the real handlers in process, over calls that gRPC
has no part in, so that a hundred thousand inputs take minutes.
"""

from __future__ import annotations

import asyncio
import contextlib
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import Message
from hypothesis import strategies as st

from preconditioner_protos import pack
from preconditioner_protos.v1 import preconditioner_pb2 as pb
from preconditioner_service.access import open_policy
from preconditioner_service.auth import BearerToken
from preconditioner_service.board import Board
from preconditioner_service.calls import WaitingRoom
from preconditioner_service.compute import compute
from preconditioner_service.dispatcher import Dispatcher
from preconditioner_service.pool import Worker
from preconditioner_service.quotas import Quotas
from preconditioner_service.server import SERVICE, ExchangeLimits, Service
from preconditioner_service.tasks import RootOutcome, RootTask
from preconditioner_service.wire import add_to
from raw_trainer import manifest, open_request, statistics

TOKEN = "a-token-for-the-fuzzer-0123456789"

u32 = st.one_of(st.integers(0, 3), st.integers(0, 2**32 - 1))
u64 = st.one_of(st.integers(0, 50), st.integers(0, 2**64 - 1))
floats = st.floats(allow_nan=True, allow_infinity=True)
names = st.one_of(
    st.sampled_from(["fuzz", "other", "", "x" * 201, "a b", "ü"]), st.text("a.-é\0", max_size=20)
)
payloads = st.one_of(st.binary(max_size=60), st.sampled_from([pack(statistics(4)).tobytes(), bytes(12)]))

manifests = st.one_of(
    st.sampled_from([manifest((4,)), manifest((4,), (2, 4)), manifest()]),
    st.builds(
        pb.Manifest,
        blocks=st.lists(
            st.builds(
                pb.Block,
                name=names,
                sides=st.lists(st.builds(pb.Side, length=u32, root_order=floats), max_size=18),
                ridge=st.builds(pb.Ridge, kind=st.integers(0, 6), value=floats),
            ),
            max_size=4,
        ),
        statistics_dtype=st.integers(0, 4),
        preconditioner_dtype=st.integers(0, 4),
        snapshots_in_flight=u32,
    ),
)
open_requests = st.builds(
    pb.OpenSessionRequest,
    protocol_version=st.sampled_from([1, 1, 1, 0, 2**32 - 1]),
    job=names,
    rank=u32,
    world_size=u32,
    epoch=u64,
    manifest=manifests,
    max_staleness=u64,
    client=names,
)
well_formed_opens = st.builds(
    open_request, st.sampled_from(["fuzz", "other"]), manifests, epoch=st.integers(0, 5)
)


@st.composite
def _chunks(draw: st.DrawFn) -> pb.MatrixChunk:
    payload = draw(payloads)
    return pb.MatrixChunk(
        block=draw(u32),
        side=draw(u32),
        step=draw(u64),
        offset=draw(st.one_of(st.just(0), u64)),
        payload=payload,
        crc32=draw(st.sampled_from([zlib.crc32(payload), 0])),
    )


trainer_messages = st.one_of(
    st.builds(
        lambda chunks: pb.TrainerMessage(chunks=pb.Chunks(chunks=chunks)), st.lists(_chunks(), max_size=8)
    ),
    st.builds(
        lambda receipts: pb.TrainerMessage(receipts=pb.Receipts(receipts=receipts)),
        st.lists(st.builds(pb.Receipt, block=u32, step=u64), max_size=5),
    ),
    st.builds(
        lambda attach: pb.TrainerMessage(attach=attach),
        st.builds(pb.Attach, session_id=names, epoch=u64, credit_bytes=u64),
    ),
    st.just(pb.TrainerMessage()),
)


@st.composite
def mutated(draw: st.DrawFn, messages: st.SearchStrategy[Message]) -> bytes:
    """A message's bytes: as they are, cut, with a byte flipped, repeated, or behind other bytes."""
    data = draw(messages).SerializeToString()
    kind = draw(st.sampled_from(["whole", "whole", "cut", "flip", "twice", "noise", "only noise"]))
    if kind == "cut":
        return data[: draw(st.integers(0, len(data)))]
    if kind == "flip" and data:
        at = draw(st.integers(0, len(data) - 1))
        return data[:at] + bytes([data[at] ^ draw(st.integers(1, 255))]) + data[at + 1 :]
    if kind == "twice":
        return data * 2
    if kind == "noise":
        return draw(st.binary(max_size=20)) + data
    return draw(st.binary(max_size=80)) if kind == "only noise" else data


@dataclass(frozen=True)
class Step:
    """One call: its method, its messages' bytes, and whether its first is a good Attach."""

    method: str
    messages: tuple[bytes, ...]
    attach: bool = False


steps = st.one_of(
    st.builds(Step, st.just("OpenSession"), st.tuples(mutated(st.one_of(open_requests, well_formed_opens)))),
    st.builds(
        Step,
        st.just("Exchange"),
        st.lists(mutated(trainer_messages), max_size=6).map(tuple),
        attach=st.booleans(),
    ),
    st.builds(
        Step,
        st.just("CloseSession"),
        st.tuples(mutated(st.builds(pb.CloseSessionRequest, session_id=names))),
    ),
    st.builds(Step, st.just("GetStatus"), st.tuples(st.binary(max_size=40))),
)
scripts = st.lists(steps, min_size=1, max_size=6)


class AbortError(Exception):
    """As gRPC's own, which ends a handler."""


class Call:
    """What a handler sees of one call: gRPC's ``ServicerContext`` with messages from a list."""

    def __init__(self, messages: Sequence[bytes]) -> None:
        self._messages = list(messages)
        self.written: list[Message] = []
        self.code = grpc.StatusCode.OK

    async def read(self) -> Any:
        await asyncio.sleep(0)
        return self._messages.pop(0) if self._messages else grpc.aio.EOF

    async def write(self, message: Message) -> None:
        message.SerializeToString()
        self.written.append(message)

    async def abort(self, code: grpc.StatusCode, details: str = "") -> None:
        details.encode()
        self.code = code
        raise AbortError

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"


class _Collector:
    """In place of a gRPC server: keeps the handlers that are added to it."""

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        (self.handler,) = handlers


@dataclass(frozen=True)
class _Details(grpc.HandlerCallDetails):
    method: str
    invocation_metadata: tuple[tuple[str, str], ...]


class _Pool:
    """Computes in process."""

    def __init__(self) -> None:
        self.workers = [Worker(0, None, alive=True)]

    async def run(self, worker: Worker, tasks: Sequence[RootTask], seconds: float) -> list[RootOutcome]:
        return compute(list(tasks))


class Handlers:
    """The service's real handlers, from the check of the token on; ``ended`` counts how calls ended."""

    def __init__(self) -> None:
        quotas = Quotas(max_sessions=4, max_blocks=8, max_side=64, max_job_bytes=2**20)
        policy = open_policy(token=TOKEN, token_file=None, jobs=None, defaults=quotas).value
        dispatcher = Dispatcher()
        dispatcher.use(_Pool())
        limits = ExchangeLimits(
            max_message_bytes=64 * 1024,
            credit_bytes=2**20,
            session_ttl=60.0,
            stream_idle_timeout=60.0,
            answer_timeout=60.0,
        )
        service = Service(
            Board(2**22, 60.0), dispatcher, lambda: policy, limits, version="fuzz", workers=lambda: 1
        )
        server = _Collector()
        add_to(server, service, WaitingRoom(4, 60.0))
        self._generic = server.handler
        self._token = BearerToken(lambda: policy)
        self.ended: Counter[str] = Counter()

    async def run(self, script: Sequence[Step]) -> None:
        """Make these calls, one after the other.

        Raises:
            Exception: whatever a handler lets through; gRPC would answer UNKNOWN.
        """
        request = open_request("attached", manifest((4,), (2, 4)))
        for step in script:
            messages = list(step.messages)
            if step.attach:
                opened = await self._call("OpenSession", [request.SerializeToString()])
                attach = pb.Attach(
                    session_id=opened.written[0].session_id, epoch=request.epoch, credit_bytes=1
                )
                messages.insert(0, pb.TrainerMessage(attach=attach).SerializeToString())
            await self._call(step.method, messages)

    async def _call(self, method: str, messages: Sequence[bytes]) -> Call:
        details = _Details(f"/{SERVICE}/{method}", (("authorization", f"Bearer {TOKEN}"),))

        async def found(details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
            return self._generic.service(details)

        handler = await self._token.intercept_service(found, details)
        call = Call(messages)
        with contextlib.suppress(AbortError):
            await handler.stream_stream(None, call)
        assert call.code not in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL), call.code
        self.ended[call.code.name] += 1
        return call


def fuzzed(script: Sequence[Step]) -> Counter[str]:
    """Run a script on a fresh service, and fail if anything is raised, be it in a task of its own."""
    unhandled: list[dict[str, Any]] = []

    async def main() -> Counter[str]:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(context))
        handlers = Handlers()
        await handlers.run(script)
        await asyncio.sleep(0)
        return handlers.ended

    ended = asyncio.run(main())
    assert not unhandled, unhandled
    return ended
