"""Cutting packed matrices into chunks, and putting them together again without trusting them.

The rules are those of ``v1/preconditioner.proto``, section MATRICES AND CHUNKS. The receiving side takes
every size from the manifest, so a hostile sender can make it hold one incomplete block and no more.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from preconditioner_protos.manifest import MAX_ENTRIES, MAX_MESSAGE_BYTES, Layout
from preconditioner_protos.v1 import preconditioner_pb2 as pb

Array = npt.NDArray[Any]

# Upper bounds of what protobuf adds to the payload: seven tagged fields of at most ten bytes with the
# chunk's own tag and length; and once a message, the oneof's tag and length.
_CHUNK_FRAMING = 64
_MESSAGE_FRAMING = 32


@dataclass(frozen=True, slots=True)
class PackedBlock:
    """The packed matrices of all sides of one block at one step.

    Attributes:
        block: index in the manifest.
        step: step of the snapshot that they are, or were computed from.
        sides: per side a contiguous 1-D array of ``n (n + 1) / 2`` values.
    """

    block: int
    step: int
    sides: tuple[Array, ...]

    @property
    def nbytes(self) -> int:
        """Packed bytes of all sides."""
        return sum(side.nbytes for side in self.sides)


@dataclass(frozen=True, slots=True)
class Refusal:
    """A (block, step) that the receiver does not accept, for the sender to be told of.

    Attributes:
        block: index in the manifest; may lie outside of it.
        step: the step that the chunk named.
        reason: the ``NackReason`` to answer with.
        detail: for people.
    """

    block: int
    step: int
    reason: pb.NackReason
    detail: str


class _RefusedError(Exception):
    def __init__(self, reason: pb.NackReason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


MessageT = TypeVar("MessageT", pb.Chunks, pb.TrainerMessage, pb.ServiceMessage)


def chunk_messages(
    blocks: Iterable[PackedBlock],
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    *,
    message: type[MessageT],
) -> Iterator[MessageT]:
    """Cut blocks into messages no larger than the limit; small matrices share one.

    Args:
        blocks: taken one at a time, as the messages are consumed.
        max_message_bytes: bound for the serialized message of a stream that carries the chunks.
        message: what to make. The chunks are made where they stay, since every assignment of a message
            copies its payloads.

    Raises:
        ValueError: the limit leaves no room for payload.
    """
    room = max_message_bytes - _MESSAGE_FRAMING
    if room <= _CHUNK_FRAMING:
        raise ValueError(f"max_message_bytes {max_message_bytes} leaves no room for a payload")
    current, used, entries = message(), 0, 0
    for block in blocks:
        for side, packed in enumerate(block.sides):
            data = np.ascontiguousarray(packed).data.cast("B")
            crc32 = zlib.crc32(data)
            offset = 0
            while offset < len(data):
                if room - used <= _CHUNK_FRAMING or entries == MAX_ENTRIES:
                    yield current
                    current, used, entries = message(), 0, 0
                size = min(len(data) - offset, room - used - _CHUNK_FRAMING)
                carrier = current if isinstance(current, pb.Chunks) else current.chunks
                carrier.chunks.add(
                    block=block.block,
                    side=side,
                    step=block.step,
                    offset=offset,
                    payload=bytes(data[offset : offset + size]),
                    crc32=crc32,
                )
                offset += size
                used += size + _CHUNK_FRAMING
                entries += 1
    if used:
        yield current


class Assembler:
    """Puts the chunks of one stream together, holding at most one incomplete block.

    After a refusal the remaining chunks of the same (block, step) are dropped silently, so that one bad
    matrix gives one refusal and the stream goes on.
    """

    def __init__(self, layout: Layout, allowed: Sequence[bool] | None = None) -> None:
        self._layout = layout
        self._allowed = allowed
        self._key: tuple[int, int] | None = None
        self._sides: list[Array] = []
        self._buffer: bytearray | None = None
        self._offset = 0
        self._crc32 = 0
        self._refused: tuple[int, int] | None = None

    @property
    def held_bytes(self) -> int:
        """Bytes of the incomplete block that is held now."""
        partial = len(self._buffer) if self._buffer is not None else 0
        return partial + sum(side.nbytes for side in self._sides)

    def add(self, chunk: pb.MatrixChunk) -> list[PackedBlock | Refusal]:
        """Take the next chunk of the stream.

        Returns:
            What this chunk decides: the block that it completes (arrays read-only and contiguous), a
            refusal because the chunk contradicts manifest, sequence or checksum, the refusal of a block
            that the sender left unfinished, or nothing yet.
        """
        outcomes: list[PackedBlock | Refusal] = []
        key = (chunk.block, chunk.step)
        if self._key is not None and key != self._key:
            detail = f"block {self._key[0]} step {self._key[1]} was left unfinished for block {key[0]}"
            outcomes.append(Refusal(*self._key, pb.NACK_REASON_MALFORMED, detail))
            self._forget()
        if key == self._refused:
            return outcomes
        self._refused = None
        try:
            whole = self._take(chunk)
        except _RefusedError as error:
            self._forget()
            self._refused = key
            outcomes.append(Refusal(*key, error.reason, str(error)))
        else:
            if whole is not None:
                outcomes.append(whole)
        return outcomes

    def _take(self, chunk: pb.MatrixChunk) -> PackedBlock | None:
        payload = chunk.payload  # read once: every read of a bytes field copies it
        if self._key is None:
            self._begin(chunk)
        size = self._layout.matrix_bytes(chunk.block, len(self._sides))
        if chunk.side != len(self._sides) or chunk.offset != self._offset:
            raise _RefusedError(
                pb.NACK_REASON_MALFORMED,
                f"chunk of side {chunk.side} at byte {chunk.offset}, expected was side {len(self._sides)} "
                f"at byte {self._offset}",
            )
        if not payload or self._offset + len(payload) > size:
            raise _RefusedError(
                pb.NACK_REASON_MALFORMED,
                f"{len(payload)} bytes at byte {self._offset} of a packed matrix of {size} bytes",
            )
        if self._offset == 0:
            self._crc32 = chunk.crc32
        elif chunk.crc32 != self._crc32:
            raise _RefusedError(pb.NACK_REASON_MALFORMED, "chunks of one matrix announce different checksums")
        data: bytes | bytearray = payload
        if len(payload) < size:
            if self._buffer is None:
                self._buffer = bytearray(size)
            self._buffer[self._offset : self._offset + len(payload)] = payload
            data = self._buffer
        self._offset += len(payload)
        if self._offset < size:
            return None
        return self._finish_side(chunk, data)

    def _begin(self, chunk: pb.MatrixChunk) -> None:
        known = chunk.block < len(self._layout)
        if not known or (self._allowed is not None and not self._allowed[chunk.block]):
            raise _RefusedError(
                pb.NACK_REASON_MALFORMED,
                f"block {chunk.block} is not announced on this stream ({len(self._layout)} blocks in all)",
            )
        self._key = (chunk.block, chunk.step)

    def _finish_side(self, chunk: pb.MatrixChunk, data: bytes | bytearray) -> PackedBlock | None:
        actual = zlib.crc32(data)
        if actual != self._crc32:
            raise _RefusedError(
                pb.NACK_REASON_CHECKSUM,
                f"side {chunk.side}: CRC-32 is {actual:#010x}, announced was {self._crc32:#010x}",
            )
        side = np.frombuffer(data, dtype=self._layout.dtype)
        side.flags.writeable = False
        self._sides.append(side)
        self._buffer, self._offset = None, 0
        if len(self._sides) < len(self._layout.sides[chunk.block]):
            return None
        whole = PackedBlock(chunk.block, chunk.step, tuple(self._sides))
        self._forget()
        return whole

    def _forget(self) -> None:
        self._key = None
        self._sides = []
        self._buffer, self._offset = None, 0
