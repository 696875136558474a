"""The gRPC end of the service: the four calls of the protocol, and reflection.

Which call ends with which status is written in ``preconditioner_protos/v1/preconditioner.proto``.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

import grpc
import grpc.aio

from preconditioner_protos import PROTOCOL_VERSION, ManifestError, check_job, check_open_request
from preconditioner_protos.v1 import preconditioner_pb2 as pb
from preconditioner_service.auth import current_caller
from preconditioner_service.board import Admission, AdmissionError, Board
from preconditioner_service.calls import Context, EndOfStream, answer
from preconditioner_service.decoding import decode_open_request, decode_trainer_message
from preconditioner_service.dispatcher import Dispatcher
from preconditioner_service.exchange import ExchangeStream, Turns
from preconditioner_service.logs import limited
from preconditioner_service.openings import Openings, Run
from preconditioner_service.policy import Caller, Grant, Policy
from preconditioner_service.quotas import QuotaError, Usage
from preconditioner_service.sessions import Footprint, Job, Plan, Session

SERVICE = "preconditioner_protos.v1.PreconditionerService"

_REVOKED = "the token is no longer good: use the new one"

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
    stream_idle_timeout: float
    answer_timeout: float


class Service:
    """The protocol's calls; :mod:`preconditioner_service.wire` makes gRPC call them.

    Args:
        board: all state.
        dispatcher: computes what arrives.
        policy: who may open which jobs, and what these may have, as it is now.
        limits: of streams.
        version: of the software, for GetStatus.
        workers: how many actors live.
    """

    def __init__(
        self,
        board: Board,
        dispatcher: Dispatcher,
        policy: Callable[[], Policy],
        limits: ExchangeLimits,
        *,
        version: str,
        workers: Callable[[], int],
    ) -> None:
        self._board = board
        self._dispatcher = dispatcher
        self._policy = policy
        self.limits = limits
        self._version = version
        self._workers = workers
        self._service_id = secrets.token_hex(8)
        self._began = time.monotonic()
        self._streams: dict[ExchangeStream, Caller] = {}
        self._turns = Turns()
        self._openings = Openings()
        self._grace: float | None = None
        self._cut = False

    async def OpenSession(self, data: bytes, context: Context) -> pb.OpenSessionResponse:
        """See the protocol. Raises ``EndOfStream``, as all calls do."""
        self._available()
        async with self._openings.turn(len(data), current_caller()) as run:
            request = await run(decode_open_request, data, self._policy().most_blocks)
            try:
                session = await self._open(request, run)
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
                raise
        return pb.OpenSessionResponse(
            session_id=session.id,
            protocol_version=PROTOCOL_VERSION,
            service_id=self._service_id,
            placement=pb.Placement(revision=1, fronts=[pb.Front()]),
            limits=pb.Limits(
                max_message_bytes=self.limits.max_message_bytes,
                credit_bytes=self.limits.credit_bytes,
                session_ttl_seconds=self.limits.session_ttl,
            ),
        )

    async def _open(self, request: pb.OpenSessionRequest, run: Run) -> Session:
        if request.protocol_version != PROTOCOL_VERSION:
            raise EndOfStream(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"protocol_version {request.protocol_version} is not spoken here, {PROTOCOL_VERSION} is: "
                "install matching versions of client and service",
            )
        manifest = request.manifest
        try:
            check_job(request.job)
            grant = self._authorize(request.job)
            grant.quotas.check_size(manifest)
            await run(check_open_request, request)
            await run(grant.quotas.check_sides, manifest)
            footprint = await run(Footprint.of, manifest)
            self._check(request, grant, footprint)
            plan = await run(Plan, request, footprint)
            # Meanwhile others may have been opened, a drain begun, the policy changed.
            self._available()
            self._check(request, self._authorize(request.job), footprint)
            session, fenced = self._board.open(request, plan)
        except ManifestError as error:
            raise EndOfStream(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from None
        except QuotaError as error:
            raise EndOfStream(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error)) from None
        except AdmissionError as error:
            raise EndOfStream(_REFUSED[error.why], str(error)) from None
        for old in fenced:
            self._dispatcher.close(old)
            _say("session fenced", old, by_epoch=request.epoch)
        self._govern(session.job)
        self._dispatcher.open(session)
        _say(
            "session opened",
            session,
            world_size=session.world_size,
            blocks=len(session.blocks),
            budget_bytes=session.footprint.total,
            max_staleness=session.max_staleness,
            client=session.client,
        )
        return session

    def _authorize(self, job: str) -> Grant:
        policy, caller = self._policy(), current_caller()
        if not policy.knows(caller):
            raise EndOfStream(grpc.StatusCode.UNAUTHENTICATED, _REVOKED)
        if not policy.opens(caller, job):
            raise EndOfStream(
                grpc.StatusCode.PERMISSION_DENIED, f"the token does not open job {job!r}: use that job's"
            )
        grant = policy.grant(job)
        assert grant is not None  # or it would open for nobody
        return grant

    def _check(self, request: pb.OpenSessionRequest, grant: Grant, footprint: Footprint) -> None:
        grant.check_jobs(request.job, (job.name for job in self._board.jobs))
        own = Usage(1, len(request.manifest.blocks), footprint.packed)
        grant.quotas.check_job(request.job, self._board.used_beside(request), own)
        self._board.check(request, footprint)

    def _govern(self, job: Job) -> None:
        if (grant := self._policy().grant(job.name)) is not None:
            grant.quotas.govern(job.share, grant.weight)

    def policy_changed(self) -> None:
        """End the streams that would not be let in any more, and give jobs what they may have from now on."""
        for stream, caller in self._streams.items():
            if (end := self._revoked(caller, stream.job)) is not None:
                stream.end_with(end.code, str(end))
        for job in self._board.jobs:
            self._govern(job)
        self._dispatcher.kick()

    def _revoked(self, caller: Caller, job: str) -> EndOfStream | None:
        """How a stream ends whose caller was let in and would not be any more."""
        policy = self._policy()
        if not policy.knows(caller):
            return EndOfStream(grpc.StatusCode.UNAUTHENTICATED, _REVOKED)
        if not policy.opens(caller, job):
            return EndOfStream(grpc.StatusCode.PERMISSION_DENIED, f"the token no longer opens job {job!r}")
        return None

    async def Exchange(self, data: bytes, context: Context) -> None:
        """See the protocol.

        Args:
            data: the stream's first message.
            context: gRPC's.
        """
        self._available()
        attach = _attach_of(data)
        session = self._session(attach)
        await answer(
            context, pb.ServiceMessage(attached=pb.Attached(epoch=session.epoch)), self.limits.answer_timeout
        )
        if session.closed:
            raise EndOfStream(grpc.StatusCode.ABORTED, "the session was closed meanwhile")
        if (end := self._revoked(current_caller(), session.job.name)) is not None:
            raise end  # the policy changed while the answer was on its way, when this was no stream yet
        stream = self._attach(session, attach, context)
        why = "connection lost"
        try:
            await stream.run()
            why = "half-closed by the trainer"
        except EndOfStream as end:
            why = str(end)
            raise
        finally:
            del self._streams[stream]
            if self._board.detach(session, stream):
                _say("stream detached", session, why=why)

    def _session(self, attach: pb.Attach) -> Session:
        session = self._board.find(attach.session_id)
        if session is None:
            raise EndOfStream(
                grpc.StatusCode.FAILED_PRECONDITION,
                "session_id: unknown here (restarted service, expired or closed session): open a new one",
            )
        self._authorize(session.job.name)
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
            credit_bytes=min(attach.credit_bytes, self.limits.credit_bytes),
            max_message_bytes=self.limits.max_message_bytes,
            idle_timeout=self.limits.stream_idle_timeout,
            turns=self._turns,
        )
        older = self._board.attach(session, stream)
        self._streams[stream] = current_caller()
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
            self._authorize(session.job.name)
            self._board.close(session, "the trainer closed the session")
            self._dispatcher.close(session)
            _say("session closed", session, why="by the trainer")
        return pb.CloseSessionResponse()

    async def GetStatus(self, request: pb.GetStatusRequest, context: Context) -> pb.GetStatusResponse:
        """See the protocol."""
        policy, caller = self._policy(), current_caller()
        return pb.GetStatusResponse(
            protocol_version_min=PROTOCOL_VERSION,
            protocol_version_max=PROTOCOL_VERSION,
            service_version=self._version,
            service_id=self._service_id,
            draining=self._grace is not None,
            workers=self._workers(),
            uptime_seconds=time.monotonic() - self._began,
            jobs=self._board.status(lambda job: policy.sees(caller, job)),
        )

    def _available(self) -> None:
        if self._grace is not None:
            raise EndOfStream(grpc.StatusCode.UNAVAILABLE, "draining: the service is going to stop")

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
            Whether everything was, within the grace and before :meth:`end_streams` was called.
        """
        self._grace = grace
        for stream in self._streams:
            stream.drain(grace)
        until = time.monotonic() + grace
        while not (settled := self._settled()) and time.monotonic() < until:
            await asyncio.sleep(0.02)
        complete = settled and not self._cut
        self.end_streams()
        return complete

    def _settled(self) -> bool:
        attached = [session for session in self._board.sessions if session.stream is not None]
        return all(session.settled for session in attached) and not any(s.unsaid for s in self._streams)

    def end_streams(self) -> None:
        """End every stream with UNAVAILABLE, whatever is under way."""
        self._cut |= not self._settled()
        for stream in self._streams:
            stream.end_with(grpc.StatusCode.UNAVAILABLE, "the service stops")


def _attach_of(data: bytes) -> pb.Attach:
    message = decode_trainer_message(data)
    if message.WhichOneof("kind") != "attach":
        raise EndOfStream(grpc.StatusCode.INVALID_ARGUMENT, "kind: the first message must be an Attach")
    return message.attach


def _say(what: str, session: Session, **fields: object) -> None:
    job, rank = session.job.name, session.rank
    limited(logging.INFO, what, (job, rank), job=job, rank=rank, epoch=session.epoch, **fields)


def enable_reflection(server: grpc.aio.Server) -> None:
    """Serve gRPC's reflection of the protocol and of health."""
    from grpc_reflection.v1alpha import reflection

    names = (SERVICE, "grpc.health.v1.Health", reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
