"""All jobs and sessions of a service: admission, epochs and their fences, attachment and expiry.

Pure bookkeeping: no gRPC, no Ray, no clock but the one handed in.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from enum import Enum, auto

from preconditioner_protos.history import Kind
from preconditioner_protos.v1 import preconditioner_pb2 as pb
from preconditioner_service.history import ServiceHistory
from preconditioner_service.quotas import Usage
from preconditioner_service.sessions import Footprint, Job, Plan, Session, Stream
from preconditioner_service.shares import Share

_FENCES = 4096
"""Jobs without a session whose last epoch is remembered, so that a zombie cannot take an old one up again."""


class Admission(Enum):
    """Why a session is not opened."""

    FENCED = auto()
    DIFFERENT_MANIFEST = auto()
    OVER_BUDGET = auto()


class AdmissionError(Exception):
    """A session is refused; the text is for the trainer's log."""

    def __init__(self, why: Admission, message: str) -> None:
        super().__init__(message)
        self.why = why


class Board:
    """All jobs and sessions of one service.

    Args:
        budget_bytes: what all sessions together may make the service hold.
        session_ttl: seconds that a session without a stream lives.
        clock: monotonic seconds.
        stream_bytes: what the messages under way of one session's stream may take, beside its footprint.
    """

    def __init__(
        self,
        budget_bytes: int,
        session_ttl: float,
        clock: Callable[[], float] = time.monotonic,
        stream_bytes: int = 0,
    ) -> None:
        self.history: ServiceHistory | None = None
        self._budget_bytes = budget_bytes
        self._stream_bytes = stream_bytes
        self._session_ttl = session_ttl
        self._clock = clock
        self._jobs: dict[str, Job] = {}
        self._sessions: dict[str, Session] = {}
        self._fences: OrderedDict[str, Job] = OrderedDict()

    @property
    def jobs(self) -> list[Job]:
        """Jobs that have a session."""
        return list(self._jobs.values())

    @property
    def sessions(self) -> list[Session]:
        """All open sessions."""
        return list(self._sessions.values())

    def find(self, session_id: str) -> Session | None:
        """The open session of that id."""
        return self._sessions.get(session_id)

    def used_beside(self, request: pb.OpenSessionRequest) -> Usage:
        """What the job's sessions hold that will stand beside the one asked for."""
        job = self._jobs.get(request.job)
        if job is None or job.epoch != request.epoch:
            return Usage()
        others = [other for rank, other in job.sessions.items() if rank != request.rank]
        return Usage(
            len(others),
            sum(len(other.blocks) for other in others),
            sum(other.budget_bytes for other in others),
        )

    def check(self, request: pb.OpenSessionRequest, footprint: Footprint) -> list[Session]:
        """Whether a session would be opened, before anything is made for it.

        Args:
            request: checked against protocol and quotas.
            footprint: of its manifest.

        Returns:
            The sessions that its epoch would fence.

        Raises:
            AdmissionError: the epoch is fenced, or the budget does not hold it.
        """
        job = self._known(request)
        if job is not None and request.epoch < job.epoch:
            raise AdmissionError(
                Admission.FENCED,
                f"epoch {request.epoch} of job {request.job!r} is fenced by epoch {job.epoch}",
            )
        if job is not None and request.epoch == job.epoch:
            if request.rank in job.sessions:
                return []
            fenced = []
        else:
            fenced = [] if job is None else list(job.sessions.values())
        held = sum(map(self._held, self._sessions.values())) - sum(map(self._held, fenced))
        needed = footprint.total + self._stream_bytes
        if held + needed > self._budget_bytes:
            raise AdmissionError(
                Admission.OVER_BUDGET,
                f"the session needs up to {needed} bytes; of the "
                f"service's {self._budget_bytes} are free {max(0, self._budget_bytes - held)}",
            )
        return fenced

    def open(self, request: pb.OpenSessionRequest, plan: Plan | None = None) -> tuple[Session, list[Session]]:
        """Open a session, or find the same one again.

        Args:
            request: checked against protocol and quotas.
            plan: the request's, if it was made before.

        Returns:
            The session, and those that its epoch fenced.

        Raises:
            AdmissionError: the epoch is fenced, the rank announced other blocks in this epoch, or the budget
                does not hold it. Nothing changed.
        """
        plan = plan or Plan(request)
        fenced = self.check(request, plan.footprint)
        job = self._known(request)
        if job is not None and request.epoch == job.epoch and request.rank in job.sessions:
            return self._again(job.sessions[request.rank], request, plan), []
        for old in fenced:
            self.close(old, f"epoch {request.epoch} took over", fenced=True)
        if job is None:
            job = Job(request.job, request.epoch, Share(request.job))
        job.epoch = request.epoch
        self._fences.pop(request.job, None)
        self._jobs[request.job] = job
        session = Session(job, request, plan)
        if self.history is not None:
            session.history = self.history.of_session(job.name, session.rank, session.epoch)
        session.say(Kind.SESSION_OPENED, blocks=len(session.blocks), budget=plan.footprint.packed)
        session.expires_at = self._clock() + self._session_ttl
        job.sessions[session.rank] = session
        job.share.blocks += len(session.blocks)
        self._sessions[session.id] = session
        return session, fenced

    def _known(self, request: pb.OpenSessionRequest) -> Job | None:
        return self._jobs.get(request.job) or self._fences.get(request.job)

    def _held(self, session: Session) -> int:
        return session.footprint.total + self._stream_bytes

    def _again(self, session: Session, request: pb.OpenSessionRequest, plan: Plan) -> Session:
        if plan.manifest_bytes != session.manifest_bytes:
            raise AdmissionError(
                Admission.DIFFERENT_MANIFEST,
                f"rank {request.rank} of job {request.job!r} announced another manifest in epoch "
                f"{request.epoch}; open a larger epoch",
            )
        session.max_staleness = request.max_staleness
        if session.stream is None:
            session.expires_at = self._clock() + self._session_ttl
        return session

    def attach(self, session: Session, stream: Stream) -> Stream | None:
        """Make this the session's stream.

        Returns:
            The stream that it supersedes, already told to end.
        """
        older = session.stream
        if older is not None:
            older.end("a newer stream of the session took over")
            session.detach()
        session.stream = stream
        session.say(Kind.STREAM_ATTACHED)
        return older

    def detach(self, session: Session, stream: Stream) -> bool:
        """A stream is gone; without another one the session lives for its ttl.

        Returns:
            False if the stream was superseded or the session closed before.
        """
        if session.closed or session.stream is not stream:
            return False
        session.detach()
        session.expires_at = self._clock() + self._session_ttl
        return True

    def close(self, session: Session, why: str, *, fenced: bool = False) -> None:
        """Free all that is held for a session; its stream, if any, ends with ABORTED."""
        if session.closed:
            return
        session.closed = True
        session.say(Kind.SESSION_CLOSED, why=why, fenced=fenced)
        if session.stream is not None:
            session.stream.end(why)
            session.stream = None
        session.job.share.blocks -= len(session.blocks)
        session.blocks = []
        session.dirty.clear()
        del self._sessions[session.id]
        job = session.job
        del job.sessions[session.rank]
        if not job.sessions:
            del self._jobs[job.name]
            self._fences[job.name] = job
            while len(self._fences) > _FENCES:
                self._fences.popitem(last=False)

    def expire(self) -> Iterator[Session]:
        """Close the sessions whose stream has been gone for longer than the ttl."""
        now = self._clock()
        for session in list(self._sessions.values()):
            if session.stream is None and session.expires_at <= now:
                self.close(session, "its stream was gone for longer than session_ttl")
                yield session

    def record_held(self) -> None:
        """Record what is held now, if that is recorded."""
        if self.history is not None:
            self.history.held(self.sessions, self._budget_bytes)

    def status(self, sees: Callable[[str], bool]) -> Iterator[pb.JobStatus]:
        """What GetStatus says of each job; those without a session are known by their fence alone.

        Args:
            sees: whether a job, by its name, is asked for; of others no block is looked at.
        """
        for job in (*self._jobs.values(), *self._fences.values()):
            if not sees(job.name):
                continue
            sessions = job.sessions.values()
            yield pb.JobStatus(
                job=job.name,
                epoch=job.epoch,
                ranks=len(sessions),
                blocks=sum(len(session.blocks) for session in sessions),
                snapshots_received=job.counters.snapshots_received,
                preconditioners_published=job.counters.preconditioners_published,
                nacks=job.counters.nacks,
                blocks_pending=sum(session.pending for session in sessions),
                blocks_in_flight=sum(session.in_flight for session in sessions),
            )
