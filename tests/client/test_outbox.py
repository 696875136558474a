from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from preconditioner_client.exchange import Arrival, Rejection, Snapshot
from preconditioner_client.inbox import Inbox
from preconditioner_client.outbox import Outbox

NOTHING = torch.empty(0)


def snap(block: int, step: int) -> Snapshot:
    return Snapshot(block, step, (NOTHING,))


def outbox(*sizes: int, credit: int = 10**9, **settings) -> Outbox:
    box = Outbox(sizes or (10, 10, 10), **settings)
    box.begin_stream(credit, same_session=False)
    return box


def drain(box: Outbox) -> list[tuple[int, int]]:
    taken = []
    while (item := box.take()) is not None:
        taken.append((item.block, item.step))
    return taken


def test_the_latest_of_a_block_wins_and_keeps_its_place():
    box = outbox()
    for key in [(1, 1), (0, 1), (1, 2), (1, 3)]:
        box.put(snap(*key))
    assert (len(box), box.waiting_bytes, box.replaced) == (2, 20, 2)
    assert drain(box) == [(1, 3), (0, 1)]
    assert (len(box), box.waiting_bytes, box.unanswered_bytes) == (0, 0, 20)


def test_several_in_flight_are_kept_up_to_the_bound():
    box = outbox(per_block=2)
    for step in (1, 2, 3):
        box.put(snap(0, step))
    box.put(snap(1, 1))
    assert box.replaced == 1
    assert drain(box) == [(0, 2), (1, 1), (0, 3)]


def test_what_is_not_newer_is_ignored():
    box = outbox()
    box.put(snap(0, 5))
    box.put(snap(0, 5))
    box.put(snap(0, 4))
    assert (drain(box), box.replaced) == ([(0, 5)], 0)
    box.put(snap(0, 5))
    assert drain(box) == []


def test_the_byte_bound_drops_the_longest_waiting():
    box = outbox(10, 20, 30, max_bytes=45)
    assert box.put(snap(0, 1)) == []
    assert box.put(snap(1, 1)) == []
    dropped = box.put(snap(2, 1))
    assert [(s.block, s.step) for s in dropped] == [(0, 1), (1, 1)]
    assert (box.waiting_bytes, box.replaced) == (30, 2)
    assert drain(box) == [(2, 1)]
    tiny = outbox(10, max_bytes=5)
    assert [s.step for s in tiny.put(snap(0, 1))] == [1]


def test_an_unknown_block_is_an_error():
    with pytest.raises(IndexError, match="block 3 is not in the session's 3 blocks"):
        outbox().put(snap(3, 1))


def test_answers_give_credit_once():
    box = outbox(10, 10, 10, credit=20)
    for block in range(3):
        box.put(snap(block, 1))
    assert drain(box) == [(0, 1), (1, 1)]
    box.acknowledged(2, 1)  # never sent
    box.acknowledged(0, 2)
    assert box.unanswered_bytes == 20
    box.acknowledged(0, 1)
    box.acknowledged(0, 1)
    assert box.unanswered_bytes == 10
    assert drain(box) == [(2, 1)]


def test_a_new_stream_of_the_session_does_not_send_what_was_acknowledged():
    box = outbox(per_block=3)
    for step in (1, 2, 3):
        box.put(snap(0, step))
    assert drain(box) == [(0, 1), (0, 2), (0, 3)]
    box.acknowledged(0, 1)
    box.begin_stream(100, same_session=True)
    assert box.unanswered_bytes == 0
    for step in (1, 2, 3):
        box.put(snap(0, step))
    assert drain(box) == [(0, 2), (0, 3)]
    assert box.refused(0, 2, outdated=True)  # only its receipt had been lost
    assert not box.refused(0, 3, outdated=False)
    assert box.unanswered_bytes == 0


def test_a_second_answer_is_no_news():
    """As where a message was duplicated on its way."""
    box = outbox()
    for step in (1, 2):
        box.put(snap(0, step))
        drain(box)
    box.acknowledged(0, 1)
    assert box.refused(0, 1, outdated=True)
    assert not box.refused(0, 2, outdated=False)
    assert box.refused(0, 2, outdated=False)
    assert box.unanswered_bytes == 0


def test_a_new_session_is_sent_everything():
    box = outbox()
    box.put(snap(0, 1))
    drain(box)
    box.acknowledged(0, 1)
    box.begin_stream(100, same_session=False)
    box.put(snap(0, 1))
    assert drain(box) == [(0, 1)]
    assert not box.refused(0, 1, outdated=True)


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("put"), st.integers(0, 3)),
            st.tuples(st.just("take"), st.just(0)),
            st.tuples(st.just("answer"), st.integers(0, 20)),
            st.tuples(st.just("break"), st.booleans()),
        ),
        max_size=80,
    ),
    st.integers(1, 3),
    st.one_of(st.none(), st.integers(1, 200)),
)
def test_bounds_hold_whatever_happens(actions, per_block, max_bytes):
    sizes = (5, 10, 40, 70)
    credit = 60
    box = outbox(*sizes, credit=credit, per_block=per_block, max_bytes=max_bytes)
    sent: list[tuple[int, int]] = []
    newest: dict[int, int] = {}
    for step, (action, value) in enumerate(actions):
        if action == "put":
            box.put(snap(value, step))
        elif action == "take" and (item := box.take()) is not None:
            assert item.step > newest.get(item.block, -1)
            newest[item.block] = item.step
            sent.append((item.block, item.step))
        elif action == "answer" and sent:
            box.acknowledged(*sent.pop(value % len(sent)))
        elif action == "break":
            box.begin_stream(credit, same_session=value)
            sent.clear()
        waiting = [s for queue in box._waiting.values() for s in queue]
        assert box.waiting_bytes == sum(sizes[s.block] for s in waiting) <= (max_bytes or 10**9)
        assert all(len(queue) <= per_block for queue in box._waiting.values())
        assert box.unanswered_bytes == sum(sizes[block] for block, _ in sent)
        assert box.unanswered_bytes <= credit or len(sent) == 1


def arrival(block: int, step: int) -> Arrival:
    return Arrival(block, step, (NOTHING,))


def test_inbox_gives_each_once_in_order():
    box = Inbox()
    assert box.deliver(arrival(1, 3))
    box.reject(Rejection(0, 1, "ROOT_FAILED", ""))
    assert box.deliver(arrival(0, 2))
    assert [(i.block, i.step) for i in box.collect()] == [(1, 3), (0, 1), (0, 2)]
    assert box.collect() == []


def test_inbox_drops_what_is_not_newer_also_after_it_was_collected():
    box = Inbox()
    assert box.deliver(arrival(0, 2))
    box.collect()
    assert not box.deliver(arrival(0, 2))
    assert not box.deliver(arrival(0, 1))
    assert not box.is_new(0, 2)
    assert box.is_new(0, 3)
    assert box.is_new(1, 0)


def test_inbox_is_bounded_when_nobody_collects():
    box = Inbox(per_block=2)
    for step in range(1, 100):
        box.deliver(arrival(0, step))
        box.reject(Rejection(1, step, "ROOT_FAILED", ""))
        box.reject(Rejection(1, step, "ROOT_FAILED", ""))
    items = box.collect()
    assert [i.step for i in items if i.block == 0] == [98, 99]
    assert [i.step for i in items if i.block == 1] == list(range(84, 100))
    assert box.superseded == 97
