"""What a line of a history says.

Every line is one JSON object with ``v`` (the format's version), ``kind``, ``at`` (seconds of CLOCK_MONOTONIC,
which all processes of one host share), ``wall`` (seconds since 1970), ``source`` (random name of the
recorder: one life of one process) and ``number`` (0, 1, 2, .. within the source, so that a hole shows). Whom
it is about stands in ``job``, ``rank`` and ``epoch``; ``block`` is an index in the session's manifest,
``version`` the step of a snapshot, and ``step`` the training step during which it happened. What else a kind
has is in :data:`DATA`.

Matrices are named by digests: the first 32 hexadecimal digits of the SHA-256 of the packed float32 values
(little-endian upper triangle, row by row), one for each side. Where matrices are saved, ``DIGEST.npy`` holds
that packed array. A history never holds tokens, session ids or addresses.
"""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

FORMAT = 1
"""Version of the lines; a reader refuses another."""


class HistoryError(ValueError):
    """A line that is no event, or a file that cannot be read; the message names file and line."""


class Kind(str, enum.Enum):
    """What happened. The part before the dot is who says it."""

    # Any recorder.
    RECORDER_OPENED = "recorder.opened"
    RECORDER_CLOSED = "recorder.closed"
    RECORDER_LOST = "recorder.lost"

    # A training process.
    TRAINER_SESSION = "trainer.session"
    TRAINER_ATTACHED = "trainer.attached"
    TRAINER_DETACHED = "trainer.detached"
    SNAPSHOT_TAKEN = "trainer.snapshot_taken"
    SNAPSHOT_SENT = "trainer.snapshot_sent"
    SNAPSHOT_ACKNOWLEDGED = "trainer.snapshot_acknowledged"
    SNAPSHOT_NACKED = "trainer.snapshot_nacked"
    RECEIVED = "trainer.received"
    DROPPED = "trainer.dropped"
    ADOPTED = "trainer.adopted"
    STEP_BEGUN = "trainer.step_begun"
    STEP_ENDED = "trainer.step_ended"
    WAIT_BEGUN = "trainer.wait_begun"
    WAIT_ENDED = "trainer.wait_ended"
    POLICY_ACTED = "trainer.policy_acted"
    TRAINER_HELD = "trainer.held"

    # A service.
    SESSION_OPENED = "service.session_opened"
    SESSION_CLOSED = "service.session_closed"
    STREAM_ATTACHED = "service.stream_attached"
    STREAM_DETACHED = "service.stream_detached"
    SNAPSHOT_ACCEPTED = "service.snapshot_accepted"
    SNAPSHOT_REFUSED = "service.snapshot_refused"
    ROOT_FAILED = "service.root_failed"
    PUBLISHED = "service.published"
    PUSHED = "service.pushed"
    RECEIPTED = "service.receipted"
    DRAIN_BEGUN = "service.drain_begun"
    DRAIN_ENDED = "service.drain_ended"
    SERVICE_HELD = "service.held"

    # Whoever tests.
    FAULT_INJECTED = "harness.fault_injected"
    FAULT_HEALED = "harness.fault_healed"


_ABOUT_BLOCK = frozenset({"job", "rank", "epoch", "block", "version"})
_ABOUT_STEP = frozenset({"job", "rank", "epoch", "step"})
_ABOUT_RANK = frozenset({"job", "rank", "epoch"})

DATA: Mapping[Kind, frozenset[str]] = {
    # role: trainer, service or harness; pid.
    Kind.RECORDER_OPENED: frozenset({"role", "pid"}),
    Kind.RECORDER_CLOSED: frozenset(),
    # events: how many could not be kept (the queue was full) or written (the disk was).
    Kind.RECORDER_LOST: frozenset({"events"}),
    # A session begins in the trainer. blocks: a list of {name, sides, root_orders, ridge: [kind, value]};
    # versions: of the preconditioners in use, -1 for none; max_staleness, policy, adoption, delay (or null),
    # stale_timeout, snapshots_in_flight; step: the latest.
    Kind.TRAINER_SESSION: _ABOUT_STEP
    | {
        "blocks",
        "versions",
        "max_staleness",
        "policy",
        "adoption",
        "delay",
        "stale_timeout",
        "snapshots_in_flight",
    },
    Kind.TRAINER_ATTACHED: _ABOUT_RANK,
    Kind.TRAINER_DETACHED: _ABOUT_RANK,
    Kind.SNAPSHOT_TAKEN: _ABOUT_BLOCK,
    Kind.SNAPSHOT_SENT: _ABOUT_BLOCK | {"digests"},
    Kind.SNAPSHOT_ACKNOWLEDGED: _ABOUT_BLOCK,
    # reason: of the protocol, or OUTBOX_FULL; on_arrival: it answers the snapshot's arrival.
    Kind.SNAPSHOT_NACKED: _ABOUT_BLOCK | {"reason", "on_arrival"},
    Kind.RECEIVED: _ABOUT_BLOCK | {"digests"},
    # A preconditioner that came and was not kept. reason: of the protocol, or OUTDATED.
    Kind.DROPPED: _ABOUT_BLOCK | {"reason"},
    # digests: null where the matrix lies on an accelerator.
    Kind.ADOPTED: _ABOUT_BLOCK | {"step", "digests"},
    Kind.STEP_BEGUN: _ABOUT_STEP,
    # seconds: of the optimizer's step; waited: of these, for the service; used: the blocks whose
    # preconditioner was applied, null if they are those of the step before. Optional: raised (true), of a
    # step that ended with an error, and of which it is not known what it applied.
    Kind.STEP_ENDED: _ABOUT_STEP | {"seconds", "waited", "used"},
    # blocks: which are waited for.
    Kind.WAIT_BEGUN: _ABOUT_STEP | {"blocks"},
    Kind.WAIT_ENDED: _ABOUT_STEP | {"seconds", "timed_out"},
    # action: graft, keep, breaker_opened or breaker_closed; blocks: which it is about.
    Kind.POLICY_ACTED: _ABOUT_STEP | {"action", "blocks"},
    # Packed bytes: waiting to be sent (bound: waiting_budget), unanswered (credit, or one block: the larger),
    # arrived and not collected (inbox, inbox_budget).
    Kind.TRAINER_HELD: _ABOUT_RANK
    | {"waiting", "waiting_budget", "unanswered", "unanswered_budget", "inbox", "inbox_budget"},
    Kind.SESSION_OPENED: _ABOUT_RANK | {"blocks", "budget"},
    # why: for people; fenced: a newer epoch took over.
    Kind.SESSION_CLOSED: _ABOUT_RANK | {"why", "fenced"},
    Kind.STREAM_ATTACHED: _ABOUT_RANK,
    Kind.STREAM_DETACHED: _ABOUT_RANK,
    # Arrived whole, kept, and to be answered by a receipt.
    Kind.SNAPSHOT_ACCEPTED: _ABOUT_BLOCK | {"digests"},
    Kind.SNAPSHOT_REFUSED: _ABOUT_BLOCK | {"reason"},
    Kind.ROOT_FAILED: _ABOUT_BLOCK | {"reason"},
    # Optional: retries, how many times the ridge or threshold of each side was multiplied by ten.
    Kind.PUBLISHED: _ABOUT_BLOCK | {"digests"},
    Kind.PUSHED: _ABOUT_BLOCK,
    Kind.RECEIPTED: _ABOUT_BLOCK,
    Kind.DRAIN_BEGUN: frozenset({"grace"}),
    # complete: all that was acknowledged was computed, pushed and receipted.
    Kind.DRAIN_ENDED: frozenset({"complete"}),
    # held: packed bytes of all sessions; budget: of the service; sessions: [job, rank, held, budget] of each;
    # rss: resident bytes of the process.
    Kind.SERVICE_HELD: frozenset({"held", "budget", "sessions", "rss"}),
    # fault: its name in the catalogue; target: job, service or link, for people. Optional: stops, the job
    # none of whose processes runs meanwhile, so that its steps take long.
    Kind.FAULT_INJECTED: frozenset({"fault", "target"}),
    Kind.FAULT_HEALED: frozenset({"fault", "target"}),
}
"""Fields that each kind has beyond those that all have."""


class Scope(NamedTuple):
    """Whom an event is about."""

    job: str
    rank: int
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One line. ``data`` holds what its kind has beyond the fields here, see :data:`DATA`."""

    kind: Kind
    at: float
    wall: float
    source: str
    number: int
    job: str | None = None
    rank: int | None = None
    epoch: int | None = None
    block: int | None = None
    version: int | None = None
    step: int | None = None
    data: Mapping[str, Any] = field(default_factory=dict)

    def line(self) -> bytes:
        """The event as a line of UTF-8, with its end."""
        entry: dict[str, Any] = {"v": FORMAT, "kind": self.kind.value}
        for name in _FIELDS:
            if (value := getattr(self, name)) is not None:
                entry[name] = value
        entry.update(self.data)
        return json.dumps(entry, separators=(",", ":")).encode() + b"\n"

    @classmethod
    def parse(cls, line: bytes | str) -> Event:
        """The event of a line.

        Raises:
            HistoryError: it is no whole event of this format.
        """
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise HistoryError(f"no JSON: {error}") from None
        if not isinstance(entry, dict):
            raise HistoryError("no JSON object")
        version, name = entry.pop("v", None), entry.pop("kind", None)
        if version != FORMAT:
            raise HistoryError(f"format {version!r}, this reads {FORMAT}")
        try:
            kind = Kind(name)
        except ValueError:
            raise HistoryError(f"unknown kind {name!r}") from None
        missing = (_EVERY | DATA[kind]) - entry.keys()
        if missing:
            raise HistoryError(f"{name} without {', '.join(sorted(missing))}")
        for key, types in _TYPES.items():
            if (value := entry.get(key)) is not None and (not isinstance(value, types) or value is True):
                raise HistoryError(f"{name} with {key} = {value!r}")
        if not math.isfinite(entry["at"]):
            raise HistoryError(f"{name} with at = {entry['at']}")
        fields = {key: entry.pop(key) for key in _FIELDS if key in entry}
        return cls(kind=kind, **fields, data=entry)

    def __str__(self) -> str:
        about = " ".join(
            f"{name}={value}"
            for name in ("job", "rank", "epoch", "block", "version", "step")
            if (value := getattr(self, name)) is not None
        )
        return f"{self.at:.3f} {self.kind.value} {about}".rstrip()


_FIELDS = ("at", "wall", "source", "number", "job", "rank", "epoch", "block", "version", "step")
_EVERY = frozenset({"at", "wall", "source", "number"})
_TYPES: Mapping[str, tuple[type, ...]] = {
    "at": (int, float),
    "wall": (int, float),
    "source": (str,),
    "number": (int,),
    "job": (str,),
    "rank": (int,),
    "epoch": (int,),
    "block": (int,),
    "version": (int,),
    "step": (int,),
}
