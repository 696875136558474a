"""The order in which blocks are computed: staleness, cost, batches, and fairness between jobs."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preconditioner_service.scheduler import BatchLimits, Scheduler
from preconditioner_service.shares import Share

ALONE = BatchLimits(blocks=1)


def cubic(lengths) -> float:
    return sum(1e-9 * n**3 for n in lengths)


def make(
    limits: BatchLimits = ALONE, shares: dict[str, Share] | None = None, **bounds: int
) -> Scheduler[str]:
    """One session of each job, of the same name."""
    scheduler: Scheduler[str] = Scheduler(cubic, limits)
    for session, bound in (bounds or {"s": 100}).items():
        scheduler.open(session, (shares or {}).get(session, Share(session)), bound)
    return scheduler


def push(scheduler, block, n, version, newest=0, session="s", **more) -> None:
    scheduler.push(
        session, block, lengths=(n,), nbytes=4 * n * n, version=version, newest_step=newest, **more
    )


def order(scheduler) -> list:
    found = []
    while (batch := scheduler.next_batch()) is not None:
        found += batch.blocks
    return found


def blocks(scheduler) -> list[int]:
    return [block for _, block in order(scheduler)]


def test_blocks_without_a_version_come_first_the_cheapest_of_them_before():
    scheduler = make()
    push(scheduler, 0, 10, version=0, newest=1000)
    push(scheduler, 1, 100, version=None)
    push(scheduler, 2, 50, version=None)
    assert blocks(scheduler) == [2, 1, 0]


def test_of_equal_cost_the_oldest_version_comes_first_then_the_first_to_arrive():
    scheduler = make()
    for block, version in enumerate([30, 10, 20, 10]):
        push(scheduler, block, 64, version, newest=100)
    assert blocks(scheduler) == [1, 3, 2, 0]


def test_age_is_weighed_by_the_root_of_the_cost():
    # 4 times the side is 64 times the cost: as urgent at 8 times the age.
    for age, first in ((79, 1), (81, 0)):
        scheduler = make(s=1000)
        push(scheduler, 0, 256, version=1000 - age, newest=1000)
        push(scheduler, 1, 64, version=990, newest=1000)
        assert blocks(scheduler)[0] == first


def test_refreshes_settle_at_rates_of_one_over_the_root_of_the_cost():
    """Twenty blocks of each of two sizes, always with a newer snapshot, and one worker."""
    scheduler = make(s=10**6)
    lengths = [32] * 20 + [128] * 20
    count = [0] * 40
    clock = 0.0
    for block, n in enumerate(lengths):
        push(scheduler, block, n, version=0)
    for _ in range(5000):
        ((_, block),) = scheduler.next_batch().blocks
        count[block] += 1
        clock += cubic((lengths[block],))
        step = int(clock * 1e6)
        push(scheduler, block, lengths[block], step, newest=step)
    assert sum(count[:20]) / sum(count[20:]) == pytest.approx(math.sqrt(4**3), rel=0.2)


def test_age_counts_by_the_jobs_own_bound():
    scheduler = make(strict=10, lax=1000)
    push(scheduler, 0, 64, version=0, newest=20, session="lax")
    push(scheduler, 0, 64, version=0, newest=5, session="strict")
    assert order(scheduler) == [("strict", 0), ("lax", 0)]


def test_a_block_waits_once_and_keeps_its_place():
    scheduler = make()
    push(scheduler, 0, 64, version=None)
    push(scheduler, 1, 64, version=None)
    push(scheduler, 0, 64, version=None)
    assert len(scheduler) == 2
    assert blocks(scheduler) == [0, 1]
    assert len(scheduler) == 0
    push(scheduler, 0, 64, version=None)
    assert len(scheduler) == 1


def test_small_blocks_share_a_batch_up_to_each_limit():
    for limits, expected in (
        (BatchLimits(seconds=1e9, blocks=3, nbytes=1 << 60), 3),
        (BatchLimits(seconds=cubic((10,)) * 4.5, blocks=99, nbytes=1 << 60), 4),
        (BatchLimits(seconds=1e9, blocks=99, nbytes=4 * 100 * 5), 5),
    ):
        scheduler = make(limits)
        for block in range(10):
            push(scheduler, block, 10, version=None)
        batch = scheduler.next_batch()
        assert [block for _, block in batch.blocks] == list(range(expected))
        assert batch.seconds == pytest.approx(expected * cubic((10,)))


def test_a_block_beyond_all_limits_travels_alone():
    scheduler = make(BatchLimits(seconds=1e-9, blocks=64, nbytes=1))
    push(scheduler, 0, 1000, version=None)
    push(scheduler, 1, 1000, version=None)
    assert [len(scheduler.next_batch().blocks) for _ in range(2)] == [1, 1]


def test_a_suspect_shares_no_batch():
    scheduler = make(BatchLimits(seconds=1e9))
    push(scheduler, 0, 10, version=None)
    push(scheduler, 1, 10, version=None, alone=True)
    push(scheduler, 2, 10, version=None)
    push(scheduler, 3, 10, version=None, alone=True)
    batches = []
    while (batch := scheduler.next_batch()) is not None:
        batches.append({block for _, block in batch.blocks})
    assert {1} in batches
    assert {3} in batches
    assert {0, 2} in batches


def test_a_flooding_job_delays_another_by_one_block():
    scheduler = make(flood=1, modest=0)
    for block in range(2000):
        push(scheduler, block, 200, version=None, session="flood")
    push(scheduler, 0, 200, version=0, newest=10, session="modest")
    assert ("modest", 0) in order(scheduler)[:2]


def test_an_idle_job_earns_no_claim_on_the_future():
    scheduler = make(busy=100, idle=100)
    for block in range(1000):
        push(scheduler, block, 200, version=None, session="busy")
    for _ in range(900):
        scheduler.next_batch()
    for block in range(1000):
        push(scheduler, block, 200, version=0, newest=1, session="idle")
    served = [session for session, _ in order(scheduler)][:150]
    assert served.count("busy") == pytest.approx(75, abs=1)


def test_a_job_that_worked_alone_owes_nothing_to_one_that_comes_later():
    """Also if nothing waits at the moment in which the other comes."""
    scheduler = make(early=100, late=100)
    for block in range(1000):
        push(scheduler, block, 200, version=None, session="early")
    assert len(order(scheduler)) == 1000
    for session in ("late", "early"):
        for block in range(100):
            push(scheduler, block, 200, version=0, newest=1, session=session)
    first = [session for session, _ in order(scheduler)][:40]
    assert first.count("early") == pytest.approx(20, abs=1)


def test_work_beyond_the_estimate_is_paid_for():
    slow = Share("slow")
    scheduler = make(shares={"slow": slow}, honest=100, slow=100)
    for session in ("honest", "slow"):
        for block in range(1000):
            push(scheduler, block, 200, version=None, session=session)
    served = {"honest": 0, "slow": 0}
    for _ in range(300):
        ((session, _),) = scheduler.next_batch().blocks
        served[session] += 1
        if session == "slow":
            slow.done(cubic((200,)), 3 * cubic((200,)))
    assert served == {"honest": 225, "slow": 75}


def test_all_sessions_of_a_job_share_what_it_is_given():
    scheduler: Scheduler[str] = Scheduler(cubic, ALONE)
    a, b = Share("a"), Share("b")
    for session, share in (("a0", a), ("a1", a), ("a2", a), ("b0", b)):
        scheduler.open(session, share, 100)
        for block in range(200):
            push(scheduler, block, 64, version=None, session=session)
    first = [session for session, _ in order(scheduler)][:100]
    assert first.count("b0") == 50


def test_a_new_weight_holds_from_then_on():
    a = Share("a")
    scheduler = make(shares={"a": a}, a=100, b=100)
    for session in "ab":
        for block in range(1000):
            push(scheduler, block, 64, version=None, session=session)
    before = [scheduler.next_batch().blocks[0][0] for _ in range(100)]
    a.weight = 4.0
    after = [scheduler.next_batch().blocks[0][0] for _ in range(100)]
    assert (before.count("a"), after.count("a")) == (50, 80)


def test_a_job_held_back_by_its_rate_has_no_claim_for_that_time():
    slow = Share("slow", max_refresh_rate=1.0)
    scheduler = make(shares={"slow": slow}, slow=100, other=100)
    for session in ("slow", "other"):
        for block in range(1000):
            push(scheduler, block, 200, version=None, session=session)
    served = [scheduler.next_batch(0.0).blocks[0][0] for _ in range(300)]
    assert served.count("slow") == 1
    assert list(scheduler.held) == [slow]
    slow.max_refresh_rate = math.inf
    served = [scheduler.next_batch(1.0).blocks[0][0] for _ in range(100)]
    assert served.count("slow") == pytest.approx(50, abs=1)
    assert not scheduler.held


def test_a_job_has_no_more_in_flight_than_its_quota():
    cost = cubic((100,))
    shares = {"a": Share("a", max_in_flight_seconds=3.5 * cost)}
    scheduler = make(BatchLimits(seconds=1e9), shares, a=100)
    for block in range(10):
        push(scheduler, block, 100, version=None, session="a")
    assert len(scheduler.next_batch().blocks) == 3
    assert scheduler.next_batch() is None
    (hold,) = scheduler.held.values()
    assert "max_in_flight_seconds" in hold.why
    shares["a"].done(cost)
    assert len(scheduler.next_batch().blocks) == 1
    assert len(scheduler) == 6


JOBS = st.dictionaries(
    st.sampled_from("abcd"),
    st.tuples(st.floats(0.1, 10), st.lists(st.integers(1, 200), min_size=1, max_size=5)),
    min_size=2,
)
"""Weight and sides of blocks, by job."""


@given(JOBS, st.integers(1, 20), st.booleans())
def test_what_waiting_jobs_are_given_is_as_their_weights_within_one_block(jobs, batch, fresh):
    """All have work at all times, and claim what they like of its age."""
    scheduler: Scheduler[str] = Scheduler(cubic, BatchLimits(seconds=0.002, blocks=batch))

    def feed(job: str, block: int) -> None:
        sides = jobs[job][1]
        push(scheduler, block, sides[block % len(sides)], None if fresh else 0, newest=block, session=job)

    for job, (weight, _) in jobs.items():
        scheduler.open(job, Share(job, weight), 0)
        for block in range(batch):
            feed(job, block)
    given_work = dict.fromkeys(jobs, 0.0)
    largest = max(cubic((max(sides),)) / weight for weight, sides in jobs.values())
    for _ in range(200):
        chosen = scheduler.next_batch()
        for job, block in chosen.blocks:
            sides = jobs[job][1]
            given_work[job] += cubic((sides[block % len(sides)],)) / jobs[job][0]
            assert max(given_work.values()) - min(given_work.values()) <= largest * (1 + 1e-9)
            feed(job, block)


@given(JOBS, st.sampled_from("abcd"))
def test_no_job_starves_whatever_the_others_send(jobs, victim):
    """Between two blocks of a job that waits, the others get no more than their shares and a block each."""
    jobs.setdefault(victim, (0.1, [8]))
    scheduler: Scheduler[str] = Scheduler(cubic, ALONE)
    for job, (weight, sides) in jobs.items():
        scheduler.open(job, Share(job, weight), 1)
        push(scheduler, 0, max(sides), None, newest=2**63, session=job)
    own_weight, own_sides = jobs[victim]
    own = cubic((max(own_sides),)) / own_weight
    bound = {
        job: weight * own + 2 * cubic((max(sides),)) for job, (weight, sides) in jobs.items() if job != victim
    }
    since = dict.fromkeys(jobs, 0.0)
    turns = 0
    for _ in range(300):
        ((job, _),) = scheduler.next_batch().blocks
        push(scheduler, 0, max(jobs[job][1]), None, newest=2**63, session=job)
        if job == victim:
            turns += 1
            since = dict.fromkeys(jobs, 0.0)
            continue
        since[job] += cubic((max(jobs[job][1]),))
        assert since[job] <= bound[job] * (1 + 1e-9)
    per_turn = sum(max(1.0, bound[job] / cubic((max(jobs[job][1]),))) for job in bound)
    assert turns >= int(300 / (1 + per_turn))


def test_claimed_steps_do_not_shut_out_a_sibling_session():
    scheduler: Scheduler[str] = Scheduler(cubic, ALONE)
    share = Share("job")
    scheduler.open("a", share, 100)
    scheduler.open("b", share, 100)
    push(scheduler, 0, 64, version=0, newest=2**63, session="a")
    push(scheduler, 0, 32, version=0, newest=2**63, session="b")
    assert order(scheduler) == [("b", 0), ("a", 0)]


def test_closing_forgets_what_waits():
    share = Share("a")
    scheduler = make(shares={"a": share}, a=1, b=1)
    push(scheduler, 0, 8, version=None, session="a")
    push(scheduler, 0, 8, version=None, session="b")
    scheduler.close("a", share)
    scheduler.close("a", share)
    assert len(scheduler) == 1
    assert order(scheduler) == [("b", 0)]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "b", "c"]),
            st.integers(0, 20),
            st.sampled_from([4, 30, 90]),
            st.one_of(st.none(), st.integers(0, 50)),
            st.booleans(),
        ),
        max_size=60,
    )
)
def test_every_block_is_handed_out_exactly_once(pushes):
    scheduler = make(BatchLimits(), a=0, b=10, c=1000)
    expected = set()
    for session, block, n, version, alone in pushes:
        push(scheduler, block, n, version, newest=60, session=session, alone=alone)
        expected.add((session, block))
    assert len(scheduler) == len(expected)
    found = order(scheduler)
    assert len(found) == len(expected)
    assert set(found) == expected


def test_a_batch_is_chosen_among_thousands_of_shapes_without_looking_at_all_of_them():
    asked = 0

    def estimate(lengths) -> float:
        nonlocal asked
        asked += 1
        return cubic(lengths)

    scheduler: Scheduler[str] = Scheduler(estimate, ALONE)
    scheduler.open("s", Share("s"), 100)
    for n in range(1, 5001):
        push(scheduler, n, n, version=0, newest=1)
    asked = 0
    found = [scheduler.next_batch().blocks[0][1] for _ in range(200)]
    assert asked < 200 * 5, "5000 shapes, 200 batches"
    assert found == list(range(1, 201)), "and still the most urgent, by age and cost"
    push(scheduler, 6000, 6000, version=None)
    assert scheduler.next_batch().blocks == (("s", 6000),)
    push(scheduler, 1, 1, version=-100, newest=1)
    assert scheduler.next_batch().blocks == (("s", 1),)
    scheduler.close("s", next(iter(scheduler._jobs)))
    assert scheduler.next_batch() is None
