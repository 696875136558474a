"""From bytes to messages, without letting few bytes become many.

An empty entry of a repeated field takes two bytes on the wire and about fifty as a parsed message, so that a
message within its size limit could take twenty times its size. Therefore entries are counted before anything
is parsed, by walking over the fields: some, which is enough for large matrices; all only where the bytes that
can begin an entry are too many.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from preconditioner_protos import MAX_ENTRIES
from preconditioner_protos.v1 import preconditioner_pb2 as pb
from preconditioner_service.calls import EndOfStream

MessageT = TypeVar("MessageT", bound=Message)

Fields: TypeAlias = "Mapping[int, Fields]"
"""Field numbers of messages on the way to repeated ones, which have no fields of interest."""

_TRAINER_ENTRIES: Fields = {2: {1: {}}, 3: {1: {}}}
_MANIFEST_BLOCKS: Fields = {6: {1: {}}}

_FEW = 1024
"""Entries that are parsed in about a millisecond."""

_SHORT = 64
"""Entries that are walked over in less time than their bytes are counted."""

_OTHER_FIELDS = 1024
"""Of a message, beside its entries; a walk over millions would hold up the streams."""

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


class _MalformedError(Exception):
    pass


def decode(kind: type[MessageT], data: bytes) -> MessageT:
    """Parse a message.

    Raises:
        EndOfStream: INVALID_ARGUMENT if the bytes are none.
    """
    try:
        return kind.FromString(data)
    except DecodeError:
        raise EndOfStream(grpc.StatusCode.INVALID_ARGUMENT, f"the bytes are no {kind.__name__}") from None


def decode_trainer_message(data: bytes) -> pb.TrainerMessage:
    """Parse a message of a stream.

    Raises:
        EndOfStream: INVALID_ARGUMENT if the bytes are none, RESOURCE_EXHAUSTED if it holds more entries than
            the protocol allows; nothing was parsed then.
    """
    if holds_more(data, _TRAINER_ENTRIES, MAX_ENTRIES):
        raise EndOfStream(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            f"a message of more than {MAX_ENTRIES} chunks or receipts; send several messages",
        )
    return decode(pb.TrainerMessage, data)


def decode_open_request(data: bytes, max_blocks: int) -> pb.OpenSessionRequest:
    """Parse a request for a session.

    Raises:
        EndOfStream: INVALID_ARGUMENT if the bytes are none, RESOURCE_EXHAUSTED if the manifest has too many
            blocks; nothing was parsed then.
    """
    if holds_more(data, _MANIFEST_BLOCKS, max_blocks):
        raise EndOfStream(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            f"manifest.blocks: more blocks than the {max_blocks} that are allowed (max_blocks)",
        )
    return decode(pb.OpenSessionRequest, data)


def may_hold_many(data: bytes) -> bool:
    """Whether a message of a stream may hold many entries for its size; large matrices look like few."""
    return _exceeds(data, _TRAINER_ENTRIES, _SHORT) and _beginnings(data) > _FEW + len(data) // 64


def holds_more(data: bytes, fields: Fields, most: int) -> bool:
    """Whether serialized bytes hold more than so many entries of repeated fields numbered 1.

    Args:
        data: of one message; what is no message holds nothing, since it will not be parsed.
        fields: where the entries are.
        most: entries that are allowed.
    """
    return (
        _exceeds(data, fields, min(most, _SHORT))
        and _beginnings(data) > most
        and _exceeds(data, fields, most)
    )


def _beginnings(data: bytes) -> int:
    # A length-delimited field 1 begins with one of them; with the second, if its tag is longer than need be.
    return data.count(b"\x0a") + data.count(b"\x8a")


def _exceeds(data: bytes, fields: Fields, most: int) -> bool:
    try:
        return _Walk(data, most).exceeds(fields)
    except _MalformedError:
        return False


class _Walk:
    def __init__(self, data: bytes, most: int) -> None:
        self._data = data
        self._entries_left = most
        self._fields_left = most + _OTHER_FIELDS

    def exceeds(self, fields: Fields) -> bool:
        return self._walk(0, len(self._data), fields)

    def _walk(self, at: int, end: int, fields: Fields) -> bool:
        data = self._data
        while at < end:
            self._fields_left -= 1
            tag, at = _number(data, at, end)
            kind = tag & 7
            if kind == _LENGTH:
                length, at = _number(data, at, end)
                if length > end - at:
                    raise _MalformedError
                inner = fields.get(tag >> 3)
                if inner:
                    if self._walk(at, at + length, inner):
                        return True
                elif inner is not None:
                    self._entries_left -= 1
                at += length
            elif kind == _VARINT:
                _, at = _number(data, at, end)
            elif kind in (_FIXED64, _FIXED32):
                at += 8 if kind == _FIXED64 else 4
            else:
                raise _MalformedError  # groups, which proto3 does not have
            if min(self._entries_left, self._fields_left) < 0:
                return True
        return False


def _number(data: bytes, at: int, end: int) -> tuple[int, int]:
    """A varint, and the position behind it. Most have one byte."""
    if at < end and data[at] < 0x80:
        return data[at], at + 1
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise _MalformedError
