"""The gRPC end of the service: the four calls of the protocol, health and reflection.

Which call ends with which status is written in ``preconditioner_protos/v1/preconditioner.proto``.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio

from preconditioner_protos import PROTOCOL_VERSION, ManifestError, check_open_request
from preconditioner_protos.v1 import preconditioner_pb2 as pb
from preconditioner_service.board import Admission, AdmissionError, Board
from preconditioner_service.dispatcher import Dispatcher
from preconditioner_service.exchange import Context, EndOfStream, ExchangeStream
from preconditioner_service.logs import event, limited
from preconditioner_service.quotas import QuotaError, Quotas
from preconditioner_service.sessions import Session

SERVICE = "preconditioner_protos.v1.PreconditionerService"

_ATTACH_TIMEOUT = 20.0
"""Seconds that a stream may stay silent before its Attach."""

_CHECK_INLINE = 512
"""Blocks up to which a manifest is checked in the event loop; larger ones would hold up the streams."""

_REFUSED = {
    Admission.FENCED: grpc.StatusCode.ABORTED,
    Admission.DIFFERENT_MANIFEST: grpc.StatusCode.INVALID_ARGUMENT,
    Admission.OVER_BUDGET: grpc.StatusCode.RESOURCE_EXHAUSTED,
}


@dataclass(frozen=True, kw_only=True)
class ExchangeLimits:
    """What streams are held to, and told in ``Limits``."""

    max_message_bytes: int
    credit_bytes: int
    session_ttl: float


class Service:
    """The protocol's calls; :mod:`preconditioner_service.wire` makes gRPC call them.

    Args:
        board: all state.
        dispatcher: computes what arrives.
        quotas: of one session.
        limits: of streams.
        version: of the software, for GetStatus.
        workers: how many actors live.
    """

    def __init__(
        self,
        board: Board,
        dispatcher: Dispatcher,
        quotas: Quotas,
        limits: ExchangeLimits,
        *,
        version: str,
        workers: Callable[[], int],
    ) -> None:
        self._board = board
        self._dispatcher = dispatcher
        self._quotas = quotas
        self._limits = limits
        self._version = version
        self._workers = workers
        self._service_id = secrets.token_hex(8)
        self._began = time.monotonic()
        self._streams: set[ExchangeStream] = set()
        self._grace: float | None = None

    async def OpenSession(self, request: pb.OpenSessionRequest, context: Context) -> pb.OpenSessionResponse:
        """See the protocol."""
        await self._available(context)
        try:
            session = await self._open(request)
        except EndOfStream as refusal:
            limited(
                logging.WARNING,
                "session refused",
                (request.job[:200], refusal.code),
                job=request.job[:200],
                rank=request.rank,
                epoch=request.epoch,
                status=refusal.code.name,
                detail=refusal,
                peer=context.peer(),
            )
            await context.abort(refusal.code, str(refusal))
        return pb.OpenSessionResponse(
            session_id=session.id,
            protocol_version=PROTOCOL_VERSION,
            service_id=self._service_id,
            placement=pb.Placement(revision=1, fronts=[pb.Front()]),
            limits=pb.Limits(
                max_message_bytes=self._limits.max_message_bytes,
                credit_bytes=self._limits.credit_bytes,
                session_ttl_seconds=self._limits.session_ttl,
            ),
        )

    async def _open(self, request: pb.OpenSessionRequest) -> Session:
        if request.protocol_version != PROTOCOL_VERSION:
            raise EndOfStream(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"protocol_version {request.protocol_version} is not spoken here, {PROTOCOL_VERSION} is: "
                "install matching versions of client and service",
            )
        manifest = request.manifest
        try:
            self._quotas.check_size(manifest)
            if len(manifest.blocks) <= _CHECK_INLINE:
                check_open_request(request)
            else:
                await asyncio.to_thread(check_open_request, request)
            self._quotas.check(manifest, self._board.held_by_job(request))
            session, fenced = self._board.open(request)
        except ManifestError as error:
            raise EndOfStream(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from None
        except QuotaError as error:
            raise EndOfStream(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error)) from None
        except AdmissionError as error:
            raise EndOfStream(_REFUSED[error.why], str(error)) from None
        for old in fenced:
            self._dispatcher.close(old)
            _say("session fenced", old, by_epoch=request.epoch)
        self._dispatcher.open(session)
        _say(
            "session opened",
            session,
            world_size=session.world_size,
            blocks=len(session.blocks),
            budget_bytes=session.budget_bytes,
            max_staleness=session.max_staleness,
            client=session.client[:100],
        )
        return session

    async def Exchange(self, _: Any, context: Context) -> None:
        """See the protocol."""
        stream: ExchangeStream | None = None
        session: Session | None = None
        why = "connection lost"
        refusal: EndOfStream | None = None
        try:
            await self._available(context)
            attach = await self._attach_message(context)
            session = self._session(attach)
            await context.write(pb.ServiceMessage(attached=pb.Attached(epoch=session.epoch)))
            if session.closed:
                raise EndOfStream(grpc.StatusCode.ABORTED, "the session was closed meanwhile")
            stream = self._attach(session, attach, context)
            await stream.run()
            why = "half-closed by the trainer"
        except EndOfStream as end:
            refusal, why = end, str(end)
        finally:
            if stream is not None and session is not None:
                self._streams.discard(stream)
                if self._board.detach(session, stream):
                    _say("stream detached", session, why=why)
        if refusal is not None:
            await context.abort(refusal.code, str(refusal))

    async def _attach_message(self, context: Context) -> pb.Attach:
        try:
            message = await asyncio.wait_for(context.read(), _ATTACH_TIMEOUT)
        except asyncio.TimeoutError:
            raise EndOfStream(
                grpc.StatusCode.INVALID_ARGUMENT, f"no Attach within {_ATTACH_TIMEOUT:.0f} s"
            ) from None
        # None: bytes that are no message.
        if message is None or message is grpc.aio.EOF or message.WhichOneof("kind") != "attach":
            raise EndOfStream(grpc.StatusCode.INVALID_ARGUMENT, "kind: the first message must be an Attach")
        attach: pb.Attach = message.attach
        return attach

    def _session(self, attach: pb.Attach) -> Session:
        session = self._board.find(attach.session_id)
        if session is None:
            raise EndOfStream(
                grpc.StatusCode.FAILED_PRECONDITION,
                "session_id: unknown here (restarted service, expired or closed session): open a new one",
            )
        if attach.epoch != session.epoch:
            raise EndOfStream(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"epoch {attach.epoch} of a session of epoch {session.epoch}",
            )
        return session

    def _attach(self, session: Session, attach: pb.Attach, context: Context) -> ExchangeStream:
        stream = ExchangeStream(
            session,
            context,
            self._dispatcher,
            credit_bytes=min(attach.credit_bytes, self._limits.credit_bytes),
            max_message_bytes=self._limits.max_message_bytes,
        )
        older = self._board.attach(session, stream)
        self._streams.add(stream)
        _say("stream attached", session, peer=context.peer(), superseded=older is not None)
        if self._grace is not None:
            stream.drain(self._grace)
        stream.wake()
        return stream

    async def CloseSession(
        self, request: pb.CloseSessionRequest, context: Context
    ) -> pb.CloseSessionResponse:
        """See the protocol."""
        session = self._board.find(request.session_id)
        if session is not None:
            self._board.close(session, "the trainer closed the session")
            self._dispatcher.close(session)
            _say("session closed", session, why="by the trainer")
        return pb.CloseSessionResponse()

    async def GetStatus(self, request: pb.GetStatusRequest, context: Context) -> pb.GetStatusResponse:
        """See the protocol."""
        return pb.GetStatusResponse(
            protocol_version_min=PROTOCOL_VERSION,
            protocol_version_max=PROTOCOL_VERSION,
            service_version=self._version,
            service_id=self._service_id,
            draining=self._grace is not None,
            workers=self._workers(),
            uptime_seconds=time.monotonic() - self._began,
            jobs=self._board.status(),
        )

    async def _available(self, context: Context) -> None:
        if self._grace is not None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "draining: the service is going to stop")

    async def expire_sessions(self, period: float = 1.0) -> None:
        """Close sessions whose ttl is over, for ever."""
        while True:
            await asyncio.sleep(period)
            for session in self._board.expire():
                self._dispatcher.close(session)
                _say("session closed", session, why="session_ttl is over")

    async def drain(self, grace: float) -> bool:
        """Tell all streams, refuse new sessions, and wait until acknowledged work is pushed and receipted.

        Returns:
            Whether everything was, within the grace.
        """
        self._grace = grace
        for stream in self._streams:
            stream.drain(grace)
        until = time.monotonic() + grace
        while not (settled := self._settled()) and time.monotonic() < until:
            await asyncio.sleep(0.02)
        self.end_streams()
        return settled

    def _settled(self) -> bool:
        attached = [session for session in self._board.sessions if session.stream is not None]
        return all(session.settled for session in attached) and not any(s.unsaid for s in self._streams)

    def end_streams(self) -> None:
        """End every stream with UNAVAILABLE."""
        for stream in self._streams:
            stream.end_with(grpc.StatusCode.UNAVAILABLE, "the service stops")


def _say(what: str, session: Session, **fields: object) -> None:
    event(logging.INFO, what, job=session.job.name, rank=session.rank, epoch=session.epoch, **fields)


class Health:
    """The standard health service: overall, and by the service's name."""

    def __init__(self) -> None:
        self._servicer = health_aio.HealthServicer()

    def add_to(self, server: grpc.aio.Server) -> None:
        """Serve it."""
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    async def set(self, serving: bool) -> None:
        """Answer SERVING or NOT_SERVING, and tell those who watch."""
        states = health_pb2.HealthCheckResponse
        for name in ("", SERVICE):
            await self._servicer.set(name, states.SERVING if serving else states.NOT_SERVING)


def enable_reflection(server: grpc.aio.Server) -> None:
    """Serve gRPC's reflection of the protocol and of health."""
    from grpc_reflection.v1alpha import reflection

    names = (SERVICE, "grpc.health.v1.Health", reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
