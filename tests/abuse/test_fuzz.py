"""No input makes a handler raise. The long form is ``make fuzz COUNT=100000``."""

from __future__ import annotations

import logging

import pytest
from fuzz_messages import Step, fuzzed, scripts
from hypothesis import HealthCheck, given, settings

from preconditioner_protos.v1 import preconditioner_pb2 as pb
from preconditioner_service.calls import EndOfStream
from preconditioner_service.decoding import decode_open_request, decode_trainer_message, holds_more

BLOCKS = {6: {1: {}}}


@pytest.fixture(autouse=True, scope="module")
def _quiet():
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(scripts)
def test_no_input_makes_a_handler_raise(script):
    assert fuzzed(script)


def test_what_the_fuzzer_drives_is_the_whole_way():
    """Else it would find nothing because nothing is reached."""
    good = pb.TrainerMessage(chunks=pb.Chunks(chunks=[pb.MatrixChunk(block=0, step=1, payload=b"")]))
    ended = fuzzed([Step("Exchange", (good.SerializeToString(),), attach=True), Step("GetStatus", (b"",))])
    assert ended == {"OK": 3}


def varint(value: int) -> bytes:
    return bytes([value & 0x7F | 0x80, value >> 7 & 0x7F | 0x80, value >> 14])


@pytest.mark.parametrize("tag", [b"\x0a", b"\x8a\x00", b"\x8a\x80\x00"])
def test_entries_are_counted_whatever_their_tags_look_like(tag):
    entry = tag + b"\x00"
    exact = b"\x32" + varint(100 * len(entry)) + entry * 100
    assert not holds_more(exact, BLOCKS, 100)
    assert len(pb.OpenSessionRequest.FromString(exact).manifest.blocks) == 100
    assert holds_more(exact + b"\x32" + varint(len(entry)) + entry, BLOCKS, 100)
    with pytest.raises(EndOfStream, match="more blocks than the 99"):
        decode_open_request(exact, 99)


def test_a_walk_over_fields_of_no_interest_ends():
    assert holds_more(b"\x08\x0a" * 100_000, BLOCKS, 1000)


def test_payloads_that_look_like_entries_are_none():
    chunk = pb.MatrixChunk(block=1, step=2, payload=b"\x0a" * 100_000)
    message = pb.TrainerMessage(chunks=pb.Chunks(chunks=[chunk]))
    assert decode_trainer_message(message.SerializeToString()) == message
