"""Chunks: whatever the cut, the same matrices arrive; whatever is wrong, one refusal and the stream lives."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preconditioner_protos import Assembler, Layout, PackedBlock, Refusal, chunk_messages, packed_length
from preconditioner_protos.v1 import preconditioner_pb2 as pb

F4 = np.dtype("<f4")
LAYOUT = Layout(((5, 3), (8,), (1, 1, 2)), F4)


def packed_block(block, step, layout=LAYOUT, seed=0):
    rng = np.random.default_rng([seed, block, step])
    return PackedBlock(
        block,
        step,
        tuple(rng.standard_normal(packed_length(n)).astype(layout.dtype) for n in layout.sides[block]),
    )


def feed(assembler, messages):
    return [outcome for message in messages for chunk in message.chunks for outcome in assembler.add(chunk)]


def same(a, b):
    return (a.block, a.step) == (b.block, b.step) and all(
        x.tobytes() == y.tobytes() for x, y in zip(a.sides, b.sides, strict=True)
    )


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9)), max_size=8),
    st.integers(110, 600),
    st.sampled_from(["<f4", "<f8"]),
)
def test_what_was_cut_arrives_whole_and_no_message_exceeds_its_limit(keys, limit, dtype):
    layout = Layout(LAYOUT.sides, np.dtype(dtype))
    blocks = [packed_block(b, s, layout) for b, s in keys]
    messages = list(chunk_messages(blocks, limit, message=pb.Chunks))
    assembler = Assembler(layout)
    arrived = feed(assembler, messages)
    assert len(arrived) == len(blocks)
    assert all(same(a, b) for a, b in zip(arrived, blocks, strict=True))
    assert assembler.held_bytes == 0
    for message in messages:
        assert pb.TrainerMessage(chunks=message).ByteSize() <= limit


def test_the_limit_holds_for_the_largest_numbers():
    layout = Layout(((40,),) * 1, F4)
    block = PackedBlock(0, 2**63, (np.zeros(packed_length(40), F4),))
    for message in chunk_messages([block], 200, message=pb.Chunks):
        for chunk in message.chunks:
            chunk.block = 2**32 - 1
            chunk.side = 2**32 - 1
        assert pb.ServiceMessage(chunks=message).ByteSize() <= 200
    with pytest.raises(ValueError, match="no room"):
        list(chunk_messages([block], 50, message=pb.Chunks))
    assert layout.total_bytes() == 3280


def test_small_matrices_share_a_message():
    blocks = [packed_block(2, s) for s in range(50)]
    assert len(list(chunk_messages(blocks, message=pb.Chunks))) == 1


def test_arrived_arrays_are_read_only():
    (arrived,) = feed(Assembler(LAYOUT), chunk_messages([packed_block(1, 1)], message=pb.Chunks))
    with pytest.raises(ValueError, match="read-only"):
        arrived.sides[0][0] = 1


def chunks_of(block, step, limit=120):
    return [
        c for m in chunk_messages([packed_block(block, step)], limit, message=pb.Chunks) for c in m.chunks
    ]


def run(chunks):
    """Outcomes of the chunks and of one more good block: whatever happened, the stream goes on."""
    outcomes = feed(Assembler(LAYOUT), [pb.Chunks(chunks=[*chunks, *chunks_of(1, 99)])])
    assert same(outcomes[-1], packed_block(1, 99))
    return outcomes[:-1]


def flip(chunk):
    payload = bytearray(chunk.payload)
    payload[0] ^= 1
    chunk.payload = bytes(payload)


@pytest.mark.parametrize(
    ("spoil", "reason", "detail"),
    [
        (lambda c: flip(c[0]), pb.NACK_REASON_CHECKSUM, "CRC-32"),
        (lambda c: c.pop(1), pb.NACK_REASON_MALFORMED, "expected was side 0"),
        (lambda c: c.insert(1, c[0]), pb.NACK_REASON_MALFORMED, "at byte 0"),
        (lambda c: c.reverse(), pb.NACK_REASON_MALFORMED, "expected was side 0"),
        (lambda c: setattr(c[1], "crc32", 7), pb.NACK_REASON_MALFORMED, "different checksums"),
        (lambda c: setattr(c[0], "payload", b""), pb.NACK_REASON_MALFORMED, "0 bytes"),
        (lambda c: setattr(c[0], "payload", bytes(1000)), pb.NACK_REASON_MALFORMED, "1000 bytes"),
        (lambda c: setattr(c[0], "offset", 2**63), pb.NACK_REASON_MALFORMED, "at byte 9223372036854775808"),
        (lambda c: [setattr(x, "block", 3) for x in c], pb.NACK_REASON_MALFORMED, "block 3 is not announced"),
        (lambda c: [setattr(x, "block", 2**32 - 1) for x in c], pb.NACK_REASON_MALFORMED, "not announced"),
        (lambda c: [setattr(x, "side", 9) for x in c], pb.NACK_REASON_MALFORMED, "chunk of side 9"),
        (lambda c: c.pop(), pb.NACK_REASON_MALFORMED, "left unfinished"),
    ],
)
def test_a_bad_matrix_is_refused_once(spoil, reason, detail):
    chunks = chunks_of(0, 5, limit=110)
    assert len(chunks) >= 3
    spoil(chunks)
    (refusal,) = [o for o in run(chunks) if isinstance(o, Refusal)]
    assert refusal.reason == reason
    assert detail in refusal.detail
    assert refusal.step == 5


def test_a_block_left_unfinished_does_not_take_the_next_with_it():
    outcomes = run([*chunks_of(0, 5)[:1], *chunks_of(1, 6)])
    assert isinstance(outcomes[0], Refusal)
    assert same(outcomes[1], packed_block(1, 6))


def test_a_block_of_another_front_is_refused():
    (refusal,) = feed(
        Assembler(LAYOUT, [True, True, False]), chunk_messages([packed_block(2, 1)], message=pb.Chunks)
    )
    assert isinstance(refusal, Refusal)


def test_at_most_one_incomplete_block_is_held():
    assembler = Assembler(LAYOUT)
    most = max(LAYOUT.block_bytes(b) for b in range(3))
    for step in range(20):
        for chunk in chunks_of(step % 2, step)[:-1]:
            assembler.add(chunk)
            assert assembler.held_bytes <= most


@given(
    st.lists(
        st.builds(
            pb.MatrixChunk,
            block=st.integers(0, 4),
            side=st.integers(0, 3),
            step=st.integers(0, 3),
            offset=st.integers(0, 64),
            payload=st.binary(max_size=64),
            crc32=st.integers(0, 2**32 - 1),
        ),
        max_size=30,
    )
)
def test_no_sequence_of_chunks_raises_or_passes_unchecked(chunks):
    assembler = Assembler(LAYOUT)
    for chunk in chunks:
        for outcome in assembler.add(chunk):
            if isinstance(outcome, PackedBlock):
                assert zlib.crc32(outcome.sides[-1].tobytes()) == chunk.crc32
        assert assembler.held_bytes <= max(LAYOUT.block_bytes(b) for b in range(3))
