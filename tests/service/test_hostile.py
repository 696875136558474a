"""What no trainer that keeps to the protocol sends. (The shared service's log is searched for tracebacks.)"""

from __future__ import annotations

import zlib

import grpc
import pytest
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from preconditioner_protos import MAX_ENTRIES, pack
from preconditioner_protos.v1 import preconditioner_pb2 as pb
from raw_trainer import manifest, open_request, statistics

_u32 = st.one_of(st.integers(0, 3), st.integers(0, 2**32 - 1))
_u64 = st.one_of(st.integers(0, 50), st.integers(0, 2**64 - 1))
_payload = st.one_of(st.binary(max_size=60), st.sampled_from([pack(statistics(4)).tobytes(), bytes(12)]))


@st.composite
def _chunk(draw):
    payload = draw(_payload)
    return pb.MatrixChunk(
        block=draw(_u32),
        side=draw(st.integers(0, 2)),
        step=draw(_u64),
        offset=draw(st.one_of(st.just(0), _u64)),
        payload=payload,
        crc32=draw(st.sampled_from([zlib.crc32(payload), 0])),
    )


_message = st.one_of(
    st.builds(
        lambda chunks: pb.TrainerMessage(chunks=pb.Chunks(chunks=chunks)), st.lists(_chunk(), max_size=8)
    ),
    st.builds(
        lambda pairs: pb.TrainerMessage(
            receipts=pb.Receipts(receipts=[pb.Receipt(block=b, step=s) for b, s in pairs])
        ),
        st.lists(st.tuples(_u32, _u64), max_size=5),
    ),
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(_message, max_size=10))
def test_every_sequence_of_messages_is_answered_and_the_stream_lives(service, messages):
    trainer = service.trainer()
    trainer.open(open_request("hostile", manifest((4,), (2, 4)), epoch=1))
    stream = trainer.attach()
    for message in messages:
        stream._requests.put(message)
    stream.put(receipts=pb.Receipts())
    stream.half_close()
    stream.until(lambda: stream.ended)
    assert stream.code is grpc.StatusCode.OK
    trainer.close()
    trainer.channel.close()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200), st.sampled_from(["OpenSession", "CloseSession", "GetStatus"]))
def test_bytes_that_are_no_message_end_their_call_alone(service, data, method):
    trainer = service.trainer()
    call = trainer.channel.unary_unary(
        f"/preconditioner_protos.v1.PreconditionerService/{method}",
        request_serializer=bytes,
        response_deserializer=bytes,
    )
    message = getattr(pb, f"{method}Request")
    try:
        message.FromString(data)
    except DecodeError:
        with pytest.raises(grpc.RpcError, match=f"no {method}Request") as caught:
            call(data, metadata=trainer.metadata, timeout=20)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    trainer.channel.close()


@pytest.mark.parametrize("first", [True, False])
def test_bytes_that_are_no_message_end_a_stream(service, trainer, job, first):
    opened = trainer.open(open_request(job, manifest((4,))))
    attach = pb.TrainerMessage(attach=pb.Attach(session_id=opened.session_id, epoch=1))
    call = trainer.channel.stream_stream(
        "/preconditioner_protos.v1.PreconditionerService/Exchange",
        request_serializer=bytes,
        response_deserializer=bytes,
    )
    messages = [b"\x00"] if first else [attach.SerializeToString(), b"\x00"]
    with pytest.raises(grpc.RpcError) as caught:
        list(call(iter(messages), metadata=trainer.metadata, timeout=20))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_hundred_thousand_tiny_matrices(service, trainer, job):
    """They hold up nobody: another trainer is served meanwhile."""
    trainer.open(open_request(job, manifest((1,))))
    stream = trainer.attach()
    one = pack(statistics(1)).tobytes()
    chunks = [
        pb.MatrixChunk(block=0, step=step, payload=one, crc32=zlib.crc32(one)) for step in range(1, 100_001)
    ]
    for first in range(0, len(chunks), MAX_ENTRIES):
        stream.put(chunks=pb.Chunks(chunks=chunks[first : first + MAX_ENTRIES]))
    other = service.trainer()
    other.open(open_request(job + "-other", manifest((4,))))
    quick = other.attach()
    quick.snapshot(0, 1, statistics(4))
    quick.until(lambda: quick.arrived)
    stream.until(lambda: len(stream.receipts) == 100_000)
    stream.until(lambda: (0, 100_000) in stream.versions())
    other.close()
    other.channel.close()


@pytest.mark.parametrize("kind", ["chunks", "receipts"])
def test_too_many_entries_in_one_message_are_not_even_parsed(trainer, job, kind):
    trainer.open(open_request(job, manifest((1,))))
    stream = trainer.attach()
    entries = {"chunks": pb.Chunks(chunks=[{}]), "receipts": pb.Receipts(receipts=[{}])}[kind]
    part = pb.TrainerMessage(**{kind: entries})
    many = pb.TrainerMessage.FromString(part.SerializeToString() * MAX_ENTRIES)
    stream.put(**{kind: getattr(many, kind)})
    stream.put(receipts=pb.Receipts(receipts=[{}]))
    stream.put(
        **{kind: getattr(pb.TrainerMessage.FromString(part.SerializeToString() * (MAX_ENTRIES + 1)), kind)}
    )
    stream.until(lambda: stream.ended)
    assert stream.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert str(MAX_ENTRIES) in stream.details


def test_an_unknown_method(trainer):
    call = trainer.channel.unary_unary("/preconditioner_protos.v1.PreconditionerService/Nothing")
    with pytest.raises(grpc.RpcError) as caught:
        call(b"", metadata=trainer.metadata, timeout=20)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
