"""The board: latest wins, epochs, and bounds that hold whatever comes in which order."""

from __future__ import annotations

import gc
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preconditioner_protos import PackedBlock
from preconditioner_protos import manifest as manifests
from preconditioner_protos.history import Kind, read_history
from preconditioner_protos.v1 import preconditioner_pb2 as pb
from preconditioner_service.board import Admission, AdmissionError, Board
from preconditioner_service.history import ServiceHistory
from preconditioner_service.sessions import Footprint, Plan, budget_bytes
from raw_trainer import manifest, open_request


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Stream:
    def __init__(self):
        self.woken, self.nacks, self.ended, self.unanswered = 0, [], None, 0

    def wake(self):
        self.woken += 1

    def nack(self, nack):
        self.nacks.append(nack)

    def end(self, why):
        self.ended = why


def packed(block: int, step: int, length: int = 3) -> PackedBlock:
    return PackedBlock(block, step, (np.zeros(length, np.float32),))


def board(budget: int = 1 << 30, ttl: float = 10.0) -> Board:
    return Board(budget, ttl, Clock())


def session_of(blocks: pb.Manifest):
    return board().open(open_request("job", blocks))[0]


def test_the_newest_snapshot_replaces_one_that_waits():
    session = session_of(manifest((2,)))
    assert session.accept(packed(0, 1))
    assert session.accept(packed(0, 2))
    assert not session.accept(packed(0, 2))
    assert not session.accept(packed(0, 1))
    assert session.begin(0).step == 2
    assert session.begin(0) is None
    assert session.accept(packed(0, 3))
    assert session.begin(0) is None, (
        "one snapshot of a block is computed at a time, so results keep their order"
    )
    session.publish(packed(0, 2))
    assert session.begin(0).step == 3


def test_a_history_says_how_often_the_ridge_was_raised(tmp_path):
    recording = board()
    recording.history = ServiceHistory(tmp_path / "service.jsonl", None)
    session = recording.open(open_request("job", manifest((2,))))[0]
    session.publish(packed(0, 1), retries=(2,))
    recording.history.close()
    events = read_history([tmp_path / "service.jsonl"]).events
    (published,) = [event for event in events if event.kind is Kind.PUBLISHED]
    assert published.data["retries"] == [2]


def test_step_zero_is_a_step():
    session = session_of(manifest((2,)))
    assert session.accept(packed(0, 0))
    assert not session.accept(packed(0, 0))


def test_depth_keeps_as_many_and_drops_the_oldest():
    session = session_of(manifest((2,), in_flight=3))
    for step in range(1, 6):
        assert session.accept(packed(0, step))
    steps = []
    while (snapshot := session.begin(0)) is not None:
        steps.append(snapshot.step)
        session.publish(snapshot)
    assert steps == [3, 4, 5]
    assert [session.take_unsent().step for _ in range(3)] == [3, 4, 5]
    assert session.next_unsent() is None


def test_a_lost_snapshot_waits_again_unless_newer_ones_took_its_place():
    session = session_of(manifest((2,), (2,)))
    for block in (0, 1):
        session.accept(packed(block, 1))
        session.begin(block)
    session.accept(packed(1, 2))
    session.requeue(0)
    session.requeue(1)
    assert session.begin(0).step == 1
    assert session.begin(1).step == 2
    assert session.begin(1) is None


def test_blocks_take_turns_at_being_pushed():
    session = session_of(manifest((2,), (2,), in_flight=2))
    for step in (1, 2):
        for block in (0, 1):
            session.publish(packed(block, step))
    taken = [session.take_unsent() for _ in range(4)]
    assert [(item.block, item.step) for item in taken] == [(0, 1), (1, 1), (0, 2), (1, 2)]


def test_what_has_no_receipt_is_unsent_again_but_never_what_was_replaced():
    holder = board()
    session, _ = holder.open(open_request("job", manifest((2,), (2,), (2,))))
    stream = Stream()
    holder.attach(session, stream)
    for block in range(3):
        session.publish(packed(block, 1))
    for _ in range(3):
        session.take_unsent()
    session.receipt(0, 1)
    session.receipt(0, 1)
    session.receipt(50, 1)
    session.publish(packed(1, 2))  # its first version is sent and without receipt, but outdated now
    assert holder.detach(session, stream)
    kept = []
    while session.next_unsent() is not None:
        kept.append(session.take_unsent())
    assert sorted((item.block, item.step) for item in kept) == [(1, 2), (2, 1)]


def test_failure_keeps_the_last_good_version_and_tells_the_stream():
    holder = board()
    session, _ = holder.open(open_request("job", manifest((2,))))
    stream = Stream()
    holder.attach(session, stream)
    session.publish(packed(0, 1))
    session.accept(packed(0, 2))
    session.begin(0)
    session.fail(0, 2, pb.NACK_REASON_INDEFINITE, "why")
    (nack,) = stream.nacks
    assert (nack.block, nack.step, nack.reason, nack.on_arrival) == (0, 2, pb.NACK_REASON_INDEFINITE, False)
    assert session.next_unsent().step == 1
    assert session.job.counters.nacks == 1


def test_opening_again_finds_the_same_session_with_its_new_bound():
    holder = board()
    first, _ = holder.open(open_request("job", manifest((2,)), max_staleness=5))
    second, _ = holder.open(open_request("job", manifest((2,)), max_staleness=7))
    assert first is second
    assert first.max_staleness == 7
    with pytest.raises(AdmissionError) as caught:
        holder.open(open_request("job", manifest((3,))))
    assert caught.value.why is Admission.DIFFERENT_MANIFEST


def test_a_larger_epoch_fences_every_rank_of_its_job_alone():
    holder = board()
    ranks = [
        holder.open(open_request("job", manifest((2,)), rank=rank, world_size=2))[0] for rank in range(2)
    ]
    other, _ = holder.open(open_request("other", manifest((2,))))
    streams = [Stream(), Stream()]
    for session, stream in zip(ranks, streams, strict=True):
        holder.attach(session, stream)
    newer, fenced = holder.open(open_request("job", manifest((2,)), epoch=2))
    assert fenced == ranks
    assert all(session.closed for session in ranks)
    assert all("epoch 2" in stream.ended for stream in streams)
    assert not other.closed
    with pytest.raises(AdmissionError) as caught:
        holder.open(open_request("job", manifest((2,)), epoch=1))
    assert caught.value.why is Admission.FENCED
    holder.close(newer, "done")
    with pytest.raises(AdmissionError) as caught:
        holder.open(open_request("job", manifest((2,)), epoch=1))
    assert caught.value.why is Admission.FENCED
    holder.open(open_request("job", manifest((2,)), epoch=2))


def test_the_epoch_of_a_job_without_sessions_is_still_told():
    """A trainer that starts takes a larger one, whatever its clock says."""
    jobs = board()
    session, _ = jobs.open(open_request("job", manifest((3,)), epoch=7))
    jobs.close(session, "over")
    (status,) = jobs.status(lambda _: True)
    assert (status.job, status.epoch, status.ranks) == ("job", 7, 0)


def test_results_for_a_closed_session_are_dropped():
    holder = board()
    session, _ = holder.open(open_request("job", manifest((2,))))
    session.accept(packed(0, 1))
    session.begin(0)
    holder.close(session, "done")
    session.publish(packed(0, 1))
    session.requeue(0)
    session.fail(0, 1, pb.NACK_REASON_ROOT_FAILED, "why")
    assert session.begin(0) is None
    assert session.held_bytes() == 0


def test_admission_by_budget_changes_nothing_when_refused():
    one = Footprint.of(manifest((100, 100))).total
    holder = board(budget=2 * one)
    holder.open(open_request("a", manifest((100, 100))))
    old, _ = holder.open(open_request("b", manifest((100, 100))))
    with pytest.raises(AdmissionError) as caught:
        holder.open(open_request("c", manifest((1,))))
    assert caught.value.why is Admission.OVER_BUDGET
    with pytest.raises(AdmissionError):
        holder.open(open_request("b", manifest((100, 100), (1,)), epoch=2))
    assert not old.closed, "a refused epoch must not fence"
    # What it fences makes room for it.
    holder.open(open_request("b", manifest((100, 100)), epoch=2))
    assert old.closed


def test_sessions_expire_without_a_stream_only():
    clock = Clock()
    holder = Board(1 << 30, 10.0, clock)
    never, _ = holder.open(open_request("never", manifest((2,))))
    session, _ = holder.open(open_request("job", manifest((2,))))
    stream = Stream()
    holder.attach(session, stream)
    clock.now = 11.0
    assert list(holder.expire()) == [never]
    holder.detach(session, stream)
    clock.now = 20.0
    assert list(holder.expire()) == []
    clock.now = 21.0
    assert list(holder.expire()) == [session]
    assert holder.find(session.id) is None


def test_a_superseded_stream_detaches_nothing():
    holder = board()
    session, _ = holder.open(open_request("job", manifest((2,))))
    older, newer = Stream(), Stream()
    assert holder.attach(session, older) is None
    assert holder.attach(session, newer) is older
    assert older.ended
    assert not holder.detach(session, older)
    assert session.stream is newer


@pytest.mark.parametrize(("sides", "in_flight"), [((1, 1), 1), ((1, 1), 64), ((1,) * 16, 64)])
def test_many_tiny_snapshots_take_no_more_than_their_session_is_charged_for(sides, in_flight):
    blocks, many = manifest(*[sides] * 30, in_flight=in_flight), range(30)

    def tiny(block: int, step: int) -> PackedBlock:
        return PackedBlock(block, step, tuple(np.zeros(1, np.float32) for _ in sides))

    gc.collect()
    tracemalloc.start()
    try:
        session = session_of(blocks)
        for step in range(1000, 1000 + 2 * in_flight + 1):
            for block in many:
                session.accept(tiny(block, step))
                if step < 1000 + in_flight:
                    session.begin(block)
                    session.publish(tiny(block, step))
        while session.next_unsent() is not None:
            session.take_unsent()
        gc.collect()
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(session.blocks[0].waiting) == len(session.blocks[0].unreceipted) == in_flight
    assert taken <= session.footprint.total


def test_a_manifest_whose_footprint_is_known_is_walked_over_once_more(monkeypatch):
    walked = []
    monkeypatch.setattr(
        manifests, "_sides", lambda blocks, read=manifests._sides: walked.append(1) or read(blocks)
    )
    request = open_request("job", manifest((2,), (3, 4)))
    footprint = Footprint.of(request.manifest)
    session, _ = board().open(request, Plan(request, footprint))
    assert len(walked) == 2
    assert session.preconditioners.sides == session.statistics.sides == ((2,), (3, 4))


def test_the_status_looks_at_no_block_of_a_job_that_is_not_asked_for():
    holder = board()
    for job in "ab":
        holder.open(open_request(job, manifest((2,))))
    (hidden,) = (session for session in holder.sessions if session.job.name == "b")
    hidden.blocks = None  # as expensive as it may be
    assert [job.job for job in holder.status(lambda job: job == "a")] == ["a"]


_blocks = st.integers(0, 2)
_actions = st.one_of(
    st.tuples(st.just("accept"), _blocks, st.integers(0, 12)),
    st.tuples(st.sampled_from(["begin", "publish", "requeue", "fail"]), _blocks, st.just(0)),
    st.tuples(st.sampled_from(["send", "receipt", "break"]), _blocks, st.integers(0, 12)),
)


@given(st.integers(0, 3), st.lists(_actions, max_size=80))
def test_whatever_happens_memory_is_bounded_and_versions_grow(in_flight, actions):
    """Nothing is pushed out of order between two breaks, all that is accepted last can still be computed."""
    blocks = manifest((20,), (30, 5), (4,), in_flight=in_flight)
    holder = board()
    session, _ = holder.open(open_request("job", blocks))
    stream = Stream()
    holder.attach(session, stream)
    sides = session.statistics.sides
    bound = budget_bytes(blocks)
    sent: dict[int, int] = {}

    def matrices(block: int, step: int) -> PackedBlock:
        return PackedBlock(block, step, tuple(np.zeros(n * (n + 1) // 2, np.float32) for n in sides[block]))

    for action, block, step in actions:
        state = session.blocks[block]
        if action == "accept":
            newest = state.newest
            assert session.accept(matrices(block, step)) == (newest is None or step > newest)
        elif action == "begin":
            session.begin(block)
        elif action == "publish" and state.computing is not None:
            session.publish(matrices(block, state.computing.step))
        elif action == "requeue":
            session.requeue(block)
        elif action == "fail" and state.computing is not None:
            session.fail(block, state.computing.step, pb.NACK_REASON_ROOT_FAILED, "")
        elif action == "send" and session.next_unsent() is not None:
            item = session.take_unsent()
            assert item.step > sent.get(item.block, -1)
            sent[item.block] = item.step
        elif action == "receipt":
            session.receipt(block, step)
        elif action == "break":
            holder.detach(session, stream)
            holder.attach(session, stream)
            sent.clear()
        assert session.held_bytes() <= bound
        assert session.dirty.keys() == {state.index for state in session.blocks if state.unsent}
