"""What a trainer records of itself, where a history was asked for; see :mod:`preconditioner_protos.history`.

Off by default: whoever may record holds ``TrainerHistory | None``, and asks for nothing but that.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from preconditioner_client.config import StalenessConfig
from preconditioner_client.exchange import Arrival, Rejection, SessionSpec, Snapshot
from preconditioner_protos.history import HistoryRecorder, Kind, Scope

_HELD_SECONDS = 0.1


class TrainerHistory:
    """Events of one optimizer. Every method costs microseconds, and may be called from any thread.

    Args:
        recorder: that writes them.
    """

    def __init__(self, recorder: HistoryRecorder) -> None:
        self._recorder = recorder
        self._scope = Scope("", 0, 0)
        self._used: npt.NDArray[np.bool_] | None = None
        self._acted_on: npt.NDArray[np.bool_] | None = None

    # -- the training thread -------------------------------------------------------------------------

    def session(
        self, session: SessionSpec, staleness: StalenessConfig, versions: Iterable[int], step: int
    ) -> None:
        """A session begins; what follows in the training thread is about it."""
        self._scope = _scope_of(session)
        self._used = self._acted_on = None
        self._recorder.record(
            Kind.TRAINER_SESSION,
            self._scope,
            step=step,
            blocks=[
                {
                    "name": block.name,
                    "sides": block.sides,
                    "root_orders": block.root_orders,
                    "ridge": (block.ridge.kind.value, block.ridge.value),
                }
                for block in session.blocks
            ],
            versions=[int(version) for version in versions],
            max_staleness=staleness.max_staleness,
            policy=staleness.policy.value,
            adoption=staleness.adoption.value,
            delay=staleness.delay,
            stale_timeout=staleness.stale_timeout,
            snapshots_in_flight=staleness.snapshots_in_flight,
        )

    def step_begun(self, step: int) -> None:
        """The optimizer's step begins."""
        self._recorder.record(Kind.STEP_BEGUN, self._scope, step=step)

    def step_ended(
        self, step: int, seconds: float, waited: float, used: npt.NDArray[np.bool_] | None
    ) -> None:
        """The step is over; ``used`` says of every block whether its preconditioner was applied.

        None: it raised an error, so that nothing is known of what it applied.
        """
        blocks = None
        if used is not None and (self._used is None or not np.array_equal(used, self._used)):
            blocks = np.flatnonzero(used).tolist()
            self._used = used
        raised: dict[str, Any] = {"raised": True} if used is None else {}
        self._recorder.record(
            Kind.STEP_ENDED,
            self._scope,
            step=step,
            seconds=round(seconds, 6),
            waited=round(waited, 6),
            used=blocks,
            **raised,
        )

    def taken(self, snapshots: Sequence[Snapshot]) -> None:
        """Snapshots were taken."""
        for snapshot in snapshots:
            self._recorder.record(
                Kind.SNAPSHOT_TAKEN, self._scope, block=snapshot.block, version=snapshot.step
            )

    def adopted(self, arrivals: Iterable[Arrival], step: int) -> None:
        """Versions were taken into use."""
        for arrival in arrivals:
            on_host = all(side.device.type == "cpu" for side in arrival.sides)
            self._recorder.record(
                Kind.ADOPTED,
                self._scope,
                block=arrival.block,
                version=arrival.step,
                step=step,
                sides=arrival.sides if on_host else (),
            )

    def wait_begun(self, step: int, late: npt.NDArray[np.bool_]) -> None:
        """A step begins to wait for blocks."""
        self._recorder.record(Kind.WAIT_BEGUN, self._scope, step=step, blocks=np.flatnonzero(late).tolist())

    def wait_ended(self, step: int, seconds: float, timed_out: bool) -> None:
        """It waits no more."""
        self._recorder.record(
            Kind.WAIT_ENDED, self._scope, step=step, seconds=round(seconds, 6), timed_out=timed_out
        )

    def breaker(self, step: int, opened: bool) -> None:
        """From now on no step waits, or steps may wait again."""
        action = "breaker_opened" if opened else "breaker_closed"
        self._recorder.record(Kind.POLICY_ACTED, self._scope, step=step, action=action, blocks=[])

    def acted(self, step: int, action: str, beyond: npt.NDArray[np.bool_]) -> None:
        """The policy acts on these blocks, and on no others; recorded when they change."""
        before = self._acted_on
        changed = beyond.any() if before is None else not np.array_equal(beyond, before)
        if changed:
            self._acted_on = beyond
            blocks = np.flatnonzero(beyond).tolist()
            self._recorder.record(Kind.POLICY_ACTED, self._scope, step=step, action=action, blocks=blocks)

    def of_session(self, session: SessionSpec) -> SessionHistory:
        """For the background of a session."""
        return SessionHistory(self._recorder, _scope_of(session))

    def close(self) -> None:
        """Write what waits, and end."""
        self._recorder.close()


class SessionHistory:
    """What the background threads record of one session.

    Args:
        recorder: that writes it.
        scope: whom it is about.
    """

    def __init__(self, recorder: HistoryRecorder, scope: Scope) -> None:
        self._recorder = recorder
        self._scope = scope
        self._held_at = 0.0

    def attached(self, attached: bool) -> None:
        """A stream stands, or is over."""
        self._recorder.record(Kind.TRAINER_ATTACHED if attached else Kind.TRAINER_DETACHED, self._scope)

    def sent(self, snapshot: Snapshot) -> None:
        """A snapshot, whose values can be read now, is handed to gRPC."""
        self._about(Kind.SNAPSHOT_SENT, snapshot.block, snapshot.step, sides=snapshot.sides)

    def acknowledged(self, keys: Iterable[tuple[int, int]]) -> None:
        """Receipts came for these (block, step)."""
        for block, step in keys:
            self._about(Kind.SNAPSHOT_ACKNOWLEDGED, block, step)

    def nacked(self, refused: Rejection, on_arrival: bool) -> None:
        """A snapshot was refused, by the service or by the outbox."""
        self._about(
            Kind.SNAPSHOT_NACKED, refused.block, refused.step, reason=refused.reason, on_arrival=on_arrival
        )

    def received(self, arrival: Arrival) -> None:
        """A preconditioner arrived whole and sound, and waits for the training thread."""
        self._about(Kind.RECEIVED, arrival.block, arrival.step, sides=arrival.sides)

    def dropped(self, block: int, step: int, reason: str) -> None:
        """A preconditioner came that is no good, or not new."""
        self._about(Kind.DROPPED, block, step, reason=reason)

    def held_is_due(self) -> bool:
        """Whether :meth:`held` was not called for a moment."""
        return time.monotonic() - self._held_at >= _HELD_SECONDS

    def held(self, **nbytes: Any) -> None:
        """Packed bytes that wait on this side, and their bounds."""
        self._held_at = time.monotonic()
        self._recorder.record(Kind.TRAINER_HELD, self._scope, **nbytes)

    def _about(self, kind: Kind, block: int, version: int, **data: Any) -> None:
        self._recorder.record(kind, self._scope, block=block, version=version, **data)


def _scope_of(session: SessionSpec) -> Scope:
    return Scope(session.job, session.rank, session.epoch)
