"""What a service records of itself, where a history was asked for; see :mod:`preconditioner_protos.history`.

Off by default: whoever may record holds ``None``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preconditioner_protos import PackedBlock
from preconditioner_protos.history import HistoryRecorder, Kind, Scope
from preconditioner_protos.v1 import preconditioner_pb2 as pb

if TYPE_CHECKING:
    from preconditioner_service.sessions import Session

HELD_SECONDS = 0.25
"""Between two looks at what is held."""


class SessionHistory:
    """Events of one session.

    Args:
        recorder: that writes them.
        scope: whom they are about.
    """

    def __init__(self, recorder: HistoryRecorder, scope: Scope) -> None:
        self._recorder = recorder
        self._scope = scope

    def say(self, kind: Kind, **data: Any) -> None:
        """Something happened to the session."""
        self._recorder.record(kind, self._scope, **data)

    def block(
        self, kind: Kind, block: int, version: int, sides: Sequence[Any] | None = None, **data: Any
    ) -> None:
        """Something happened to a snapshot or preconditioner."""
        self._recorder.record(kind, self._scope, block=block, version=version, sides=sides, **data)

    def published(self, preconditioner: PackedBlock, retries: Sequence[int]) -> None:
        """A root was computed; ``retries`` are of each side, or none where they are not known."""
        known: dict[str, Any] = {"retries": list(retries)} if retries else {}
        self.block(Kind.PUBLISHED, preconditioner.block, preconditioner.step, preconditioner.sides, **known)

    def failed(self, kind: Kind, block: int, version: int, reason: pb.NackReason) -> None:
        """No preconditioner will come from a snapshot."""
        name = pb.NackReason.Name(reason).removeprefix("NACK_REASON_")
        self.block(kind, block, version, reason=name)


class ServiceHistory:
    """Events of one service.

    Args:
        path: see :class:`HistoryRecorder`.
        matrices: see :class:`HistoryRecorder`.

    Raises:
        HistoryError: the file cannot be written.
    """

    def __init__(self, path: Path, matrices: Path | None) -> None:
        self._recorder = HistoryRecorder(path, "service", matrices)

    def of_session(self, job: str, rank: int, epoch: int) -> SessionHistory:
        """For a session."""
        return SessionHistory(self._recorder, Scope(job, rank, epoch))

    def drain_begun(self, grace: float) -> None:
        """No new work is taken."""
        self._recorder.record(Kind.DRAIN_BEGUN, grace=grace)

    def drain_ended(self, complete: bool) -> None:
        """What was acknowledged is done, or the grace is over."""
        self._recorder.record(Kind.DRAIN_ENDED, complete=complete)

    def held(self, sessions: Iterable[Session], budget: int) -> None:
        """What is held now."""
        each = [(s.job.name, s.rank, s.held_bytes(), s.footprint.packed) for s in sessions]
        self._recorder.record(
            Kind.SERVICE_HELD,
            held=sum(held for _, _, held, _ in each),
            budget=budget,
            sessions=each,
            rss=_resident_bytes(),
        )

    def close(self) -> None:
        """Write what waits, and end."""
        self._recorder.close()


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
