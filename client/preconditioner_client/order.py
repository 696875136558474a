"""Which session is asked for, and which stream carries it."""

from __future__ import annotations

from dataclasses import dataclass

from preconditioner_client.announcement import open_request
from preconditioner_client.exchange import SessionSpec
from preconditioner_client.outbox import Key
from preconditioner_client.recording import SessionHistory, TrainerHistory
from preconditioner_protos import packed_length
from preconditioner_protos.v1 import preconditioner_pb2 as pb

_ITEM_BYTES = 4  # float32 both ways


@dataclass(frozen=True, slots=True, eq=False)
class Order:
    """A session that the trainer asked for; compared by identity, since a later one replaces it."""

    spec: SessionSpec
    request: pb.OpenSessionRequest
    block_bytes: tuple[int, ...]
    log: SessionHistory | None = None

    @classmethod
    def of(cls, spec: SessionSpec, history: TrainerHistory | None = None) -> Order:
        """The order for a session: how it is announced, and the packed size of each of its blocks.

        Raises:
            ManifestError: the session contradicts the protocol.
        """
        return cls(
            spec,
            open_request(spec),
            tuple(sum(map(packed_length, b.sides)) * _ITEM_BYTES for b in spec.blocks),
            None if history is None else history.of_session(spec),
        )


class Lane:
    """Names one stream: what carries an older lane than the mailbox's is out of date and is ignored."""

    __slots__ = ("attached", "draining", "receipt_bytes", "receipts")

    def __init__(self) -> None:
        self.attached = False
        self.draining = False
        self.receipts: list[Key] = []
        self.receipt_bytes = 0
