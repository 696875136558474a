"""Every check finds the fault that is planted for it, and nothing in a history without one."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from history_story import BLOCKS, BOUND, LIFE, SIDE, good_story
from preconditioner_client import Ridge
from preconditioner_protos.history import Kind, Scope
from preconditioner_worker.history import Expectations, check_history, examine
from preconditioner_worker.history.rules import CHECKS

PLANTED = []


def planted(check, rule, says="", *, settings=None, **expectations):
    """A function that spoils a good story in one way; what is found says which."""

    def register(function):
        PLANTED.append(
            pytest.param(
                check, rule, says, function, settings or {}, expectations, id=f"{check}: {function.__name__}"
            )
        )
        return function

    return register


def expected(tmp_path, **expectations):
    return Expectations(
        matrices=tmp_path / "matrices", recovery_seconds=0.1, killed=frozenset(), **expectations
    )


@pytest.fixture
def tell(tmp_path):
    (tmp_path / "matrices").mkdir()
    return lambda **settings: good_story(tmp_path / "matrices", **settings)


@pytest.mark.parametrize("settings", [{}, {"adoption": "scheduled", "delay": 10}, {"policy": "keep"}])
def test_a_good_history_breaks_no_rule_and_every_check_looks_at_it(tell, tmp_path, settings):
    report = examine(tell(**settings).write(tmp_path), expectations=expected(tmp_path))
    assert report.violations == ()
    assert len(report.looked_at) == len(CHECKS)
    idle = {check for check, looked_at in report.looked_at.items() if not looked_at}
    assert idle == (set() if "delay" in settings else {"schedule"})


@planted("waits", 1)
def a_wait_within_the_bound(story):
    step = story.find(Kind.STEP_ENDED, step=25)
    story.insert(step, Kind.WAIT_BEGUN, "trainer", step=25, blocks=[0])


@planted("waits", 1, settings={"policy": "graft"})
def a_wait_under_another_policy(story):
    step = story.find(Kind.STEP_ENDED, step=25)
    story.insert(step, Kind.WAIT_BEGUN, "trainer", step=25, blocks=[0])


@planted("waits", 1, "whose age is within the bound")
def a_wait_for_no_block(story):
    step = story.find(Kind.STEP_ENDED, step=25)
    story.insert(step, Kind.WAIT_BEGUN, "trainer", step=25, blocks=[])


@planted("waits", 1, "the breaker was open")
def a_wait_with_an_open_breaker(story):
    step = story.find(Kind.STEP_ENDED, step=25)
    story.insert(step, Kind.POLICY_ACTED, "trainer", step=25, action="breaker_opened", blocks=[])
    story.insert(step + 1, Kind.WAIT_BEGUN, "trainer", step=25, blocks=[0])


@planted("waits", 1, "its waits took 0.000000 s")
def an_undeclared_wait(story):
    story.change(story.find(Kind.STEP_ENDED, step=25), data={"seconds": 8.0, "waited": 7.9})


@planted("waits", 1, "stale_timeout is")
def a_wait_longer_than_its_timeout(story):
    step = story.find(Kind.STEP_ENDED, step=25)
    story.change(step, data={"seconds": 60.0, "waited": 60.0})
    story.insert(step, Kind.WAIT_ENDED, "trainer", step=25, seconds=60.0, timed_out=True)


@planted("step_time", 1)
def one_stall_in_a_long_life(story):
    story.change(story.find(Kind.STEP_ENDED, 30), data={"seconds": 3.5})


@planted("step_time", 1, step_count=60)
def slow_steps(story):
    for position in range(4):
        story.change(story.find(Kind.STEP_ENDED, position), data={"seconds": 2.0})


def without_the_end_of(story, step):
    """The story, and where that step's end was."""
    index = story.find(Kind.STEP_ENDED, step=step)
    del story.events[index]
    return index


@planted("step_time", 1, "step 25 of job job began and did not end; its process closed")
def a_step_that_never_ends(story):
    without_the_end_of(story, 25)


@planted("step_time", 1, "step 60 of job job began and did not end; the last that its process said came 3.5")
def a_step_that_hangs_while_other_threads_go_on(story):
    index = without_the_end_of(story, 60)
    del story.events[story.find(Kind.RECORDER_CLOSED, source="trainer")]
    begun = story.find(Kind.STEP_BEGUN, step=60)
    story.insert(index, Kind.TRAINER_DETACHED, "trainer")
    story.change(index, at=story.events[begun].at + 3.5)


@planted("step_time", 1, "step 60 of job job began and did not end; the last that its process said came 6.5")
def a_wait_that_never_ends(story):
    index = without_the_end_of(story, 60)
    del story.events[story.find(Kind.RECORDER_CLOSED, source="trainer")]
    begun = story.find(Kind.STEP_BEGUN, step=60)
    story.insert(index, Kind.WAIT_BEGUN, "trainer", step=60, blocks=[0])
    story.insert(index + 1, Kind.TRAINER_DETACHED, "trainer")
    story.change(index + 1, at=story.events[begun].at + 6.5)


@planted("endings", 1, "process 2 fell silent")
def a_trainer_that_hangs_for_good(story):
    story.events = [e for e in story.events if e.source != "trainer" or (e.step or 0) < 50]
    del story.events[story.find(Kind.RECORDER_CLOSED, source="trainer")]


@planted("ages", 2)
def an_old_preconditioner_is_applied(story):
    # Block 1 is not refreshed any more after its first version.
    story.events = [
        e for e in story.events if not (e.kind is Kind.ADOPTED and e.block == 1 and e.version > 10)
    ]
    story.insert(
        story.find(Kind.STEP_ENDED, step=11 + BOUND),
        Kind.POLICY_ACTED, "trainer", step=11 + BOUND, action="graft", blocks=[1],
    )  # fmt: skip


@planted("ages", 2)
def no_policy_acts_beyond_the_bound(story):
    story.events = [
        e for e in story.events if not (e.kind is Kind.ADOPTED and e.block == 1 and e.version > 10)
    ]
    for index, event in enumerate(story.events):
        if event.kind is Kind.STEP_ENDED and event.step >= 11:
            story.change(index, data={"used": [0]})


@planted("ages", 2)
def another_policy_acts(story):
    step = story.find(Kind.STEP_ENDED, step=25)
    story.insert(step, Kind.POLICY_ACTED, "trainer", step=25, action="keep", blocks=[0])


@planted("diagonal", 3)
def a_block_without_a_version_is_preconditioned(story):
    story.change(story.find(Kind.STEP_ENDED, step=5), data={"used": [1]})


@planted("adoption", 4)
def an_older_version_is_adopted_again(story):
    last = story.events[story.find(Kind.ADOPTED, block=0, version=20)]
    story.insert(
        story.find(Kind.STEP_ENDED, step=45),
        Kind.ADOPTED, "trainer", step=45, block=0, version=20, digests=last.data["digests"],
    )  # fmt: skip


@planted("adoption", 4)
def a_version_is_adopted_that_never_arrived(story):
    del story.events[story.find(Kind.RECEIVED, block=0, version=20)]


@planted("adoption", 4)
def another_matrix_is_adopted_than_arrived(story):
    other = story.events[story.find(Kind.ADOPTED, block=1, version=20)]
    story.change(story.find(Kind.ADOPTED, block=0, version=20), data={"digests": other.data["digests"]})


@planted("adoption", 4, "the session has 2")
def a_block_is_adopted_that_the_session_does_not_have(story):
    last = story.events[story.find(Kind.ADOPTED, block=0, version=20)]
    story.insert(
        story.find(Kind.STEP_ENDED, step=25),
        Kind.ADOPTED, "trainer", step=25, block=BLOCKS, version=20, digests=last.data["digests"],
    )  # fmt: skip


@planted("adoption", 4, "version 20 was adopted in step 19")
def a_version_from_the_future_is_adopted(story):
    story.change(story.find(Kind.ADOPTED, block=0, version=20), step=19)


@planted("epochs", 4, "3 versions of 2 blocks")
def a_session_with_more_versions_than_blocks(story):
    story.change(story.find(Kind.TRAINER_SESSION), data={"versions": [-1] * (BLOCKS + 1)})


@planted("epochs", 4, "newer versions of the blocks [1]")
def a_session_with_a_version_from_the_future(story):
    story.change(story.find(Kind.TRAINER_SESSION), data={"versions": [-1, 5]})


@planted("epochs", 4)
def a_resumed_trainer_takes_an_older_epoch(story):
    story.tell("late", Kind.RECORDER_OPENED, role="trainer", pid=3)
    story.session("late", "service", Scope("job", 0, 999), step=60)
    story.tell("late", Kind.RECORDER_CLOSED)


@planted("service_versions", 4)
def a_service_accepts_an_old_snapshot(story):
    old = story.events[story.find(Kind.SNAPSHOT_ACCEPTED, block=0, version=20)]
    story.insert(
        story.find(Kind.STEP_ENDED, step=45),
        Kind.SNAPSHOT_ACCEPTED, "service", block=0, version=20, digests=old.data["digests"],
    )  # fmt: skip


@planted("service_versions", 4)
def a_failed_snapshot_is_published(story):
    index = story.find(Kind.PUBLISHED, block=0, version=20)
    story.insert(index, Kind.ROOT_FAILED, "service", block=0, version=20, reason="ROOT_FAILED")


@planted("service_versions", 4, "its snapshot never accepted")
def a_version_without_a_snapshot_is_published(story):
    del story.events[story.find(Kind.SNAPSHOT_ACCEPTED, block=0, version=20)]


@planted("acknowledged", 5)
def an_acknowledged_snapshot_is_lost_in_a_drain(story):
    for kind in (Kind.PUBLISHED, Kind.PUSHED, Kind.RECEIVED, Kind.RECEIPTED):
        del story.events[story.find(kind, block=1, version=60)]


@planted("acknowledged", 5)
def a_preconditioner_is_not_pushed_in_a_drain(story):
    for kind in (Kind.PUSHED, Kind.RECEIVED, Kind.RECEIPTED):
        del story.events[story.find(kind, block=1, version=60)]


@planted("acknowledged", 5)
def a_receipt_for_what_nobody_accepted(story):
    index = story.find(Kind.SNAPSHOT_ACKNOWLEDGED, block=0, version=20)
    story.change(index, version=19)


@planted("memory", 6)
def an_outbox_beyond_its_budget(story):
    story.change(story.find(Kind.TRAINER_HELD, 2), data={"waiting": 101})


@planted("memory", 6, "unanswered: 101 bytes")
def unanswered_snapshots_beyond_their_budget(story):
    story.change(story.find(Kind.TRAINER_HELD, 2), data={"unanswered": 101})


@planted("memory", 6, "inbox: 101 bytes")
def an_inbox_beyond_its_budget(story):
    story.change(story.find(Kind.TRAINER_HELD, 2), data={"inbox": 101})


@planted("memory", 6, "service: 11 bytes")
def a_service_beyond_its_budget(story):
    story.change(story.find(Kind.SERVICE_HELD, 2), data={"held": 11})


@planted("memory", 6)
def a_job_beyond_its_budget_at_the_service(story):
    story.change(story.find(Kind.SERVICE_HELD, 2), data={"sessions": [["job", 0, 11, 10]]})


@planted("memory", 6, service_rss=5000)
def a_service_that_grows(story):
    story.change(story.find(Kind.SERVICE_HELD, 2), data={"rss": 5001})


def everywhere(story, block, version, digests):
    """Wherever a root appears, another one."""
    for kind in (Kind.PUBLISHED, Kind.RECEIVED, Kind.ADOPTED):
        story.change(story.find(kind, block=block, version=version), data={"digests": digests})


@planted("roots", 8)
def a_root_of_another_snapshot(story):
    other = story.events[story.find(Kind.ADOPTED, block=0, version=30)]
    everywhere(story, 0, 20, other.data["digests"])


@planted("roots", 8)
def a_root_that_is_slightly_wrong(story):
    from preconditioner_protos.history import load_matrix

    (digest,) = story.events[story.find(Kind.ADOPTED, block=0, version=20)].data["digests"]
    packed = load_matrix(story._matrices, digest)
    full = np.zeros((SIDE, SIDE), np.float32)
    full[np.triu_indices(SIDE)] = packed
    full[0, 0] *= 1 + 3e-4
    everywhere(story, 0, 20, [story.save(full)])


@planted("roots", 8, "the power 0")
def a_root_with_a_larger_ridge_than_the_service_said(story):
    everywhere(story, 0, 20, [story.save(story.root_of(0, 20, Ridge(value=1e-5)))])


@planted("roots", 8, "the power 1")
def a_root_with_a_smaller_ridge_than_the_service_said(story):
    story.change(story.find(Kind.PUBLISHED, block=0, version=20), data={"retries": [1]})


@planted("jobs", 9)
def a_matrix_of_another_job(story):
    story.tell("stranger", Kind.RECORDER_OPENED, role="trainer", pid=3)
    strange = Scope("other", 0, 1)
    story.session("stranger", "service", strange)
    digests = story.trip("stranger", "service", 0, 10, strange)
    story.tell("stranger", Kind.RECORDER_CLOSED)
    late = story.find(Kind.STEP_ENDED, step=60)
    story.events.append(story.events.pop(late))
    story.tell("trainer", Kind.RECEIVED, LIFE, block=0, version=61, digests=digests)


@planted("jobs", 9)
def a_preconditioner_that_nobody_published(story):
    index = story.find(Kind.STEP_ENDED, step=45)
    story.insert(index, Kind.RECEIVED, "trainer", block=0, version=44, digests=["0" * 32])


@planted("jobs", 9)
def a_snapshot_that_arrives_altered(story):
    story.change(story.find(Kind.SNAPSHOT_ACCEPTED, block=0, version=20), data={"digests": ["0" * 32]})


@planted("jobs", 9)
def a_fenced_epoch_is_served(story):
    index = story.find(Kind.STEP_ENDED, step=45)
    story.insert(index, Kind.SESSION_OPENED, "service", Scope("job", 1, 2000), blocks=1, budget=1)


@planted("jobs", 9, "epoch 999 was opened after epoch 1000")
def an_older_epoch_is_opened(story):
    index = story.find(Kind.STEP_ENDED, step=45)
    story.insert(index, Kind.SESSION_OPENED, "service", Scope("job", 1, 999), blocks=1, budget=1)


@planted("schedule", 10, settings={"adoption": "scheduled", "delay": 10})
def a_version_before_its_step(story):
    story.change(story.find(Kind.ADOPTED, block=0, version=20), step=29)


@planted("schedule", 10, settings={"adoption": "scheduled", "delay": 10})
def a_version_after_its_step(story):
    story.change(story.find(Kind.ADOPTED, block=0, version=20), step=31)


@planted("recovery", 2)
def no_version_after_the_last_fault(story):
    story.tell("faults", Kind.RECORDER_OPENED, role="harness", pid=3)
    index = story.find(Kind.STEP_ENDED, step=25)
    story.insert(index, Kind.FAULT_HEALED, "faults", None, fault="partition", target="job")
    story.events = [
        e for e in story.events if not (e.kind is Kind.ADOPTED and e.step is not None and e.step > 25)
    ]


@planted("recovery", 2)
def no_version_for_the_newest_epoch_while_a_replaced_process_announces_its_own(story):
    no_version_after_the_last_fault(story)
    index = story.find(Kind.STEP_ENDED, step=30)
    session = story.events[story.find(Kind.TRAINER_SESSION)]
    scope = Scope(session.job, session.rank, session.epoch - 1)
    story.insert(index, Kind.TRAINER_SESSION, "zombie", scope, step=session.step, **session.data)
    story.insert(index, Kind.RECORDER_OPENED, "zombie", None, role="trainer", pid=4)


@pytest.mark.parametrize(("check", "rule", "says", "spoil", "settings", "expectations"), PLANTED)
def test_a_planted_fault_is_found(tell, tmp_path, check, rule, says, spoil, settings, expectations):
    story = tell(**settings)
    spoil(story)
    found = check_history(story.write(tmp_path), expectations=expected(tmp_path, **expectations))
    of_check = [v.message for v in found if (v.check, v.rule) == (check, rule)]
    assert any(says in message for message in of_check), found
    assert all(violation.message and violation.events for violation in found)


def with_a_hole(story, source, kind, **fields):
    """Write the story without one event, so that the numbers of its source show the gap."""
    hole = story.find(kind, **fields)

    def write(folder):
        paths = story.write(folder)
        of_source = [event for event in story.events if event.source == source]
        path = folder / f"{source}.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        del lines[of_source.index(story.events[hole])]
        path.write_bytes(b"".join(lines))
        return paths

    return write


@pytest.mark.parametrize(
    ("check", "kind"), [("acknowledged", Kind.SNAPSHOT_ACCEPTED), ("jobs", Kind.PUBLISHED)]
)
def test_what_a_hole_hides_is_neither_broken_nor_looked_at(tell, tmp_path, check, kind):
    whole = examine(tell().write(tmp_path), expectations=expected(tmp_path))
    write = with_a_hole(tell(), "service", kind, block=0, version=20)
    holed = examine(write(tmp_path), expectations=expected(tmp_path))
    assert holed.history.holes == 1
    assert holed.violations == ()
    # Neither it nor, in 'acknowledged', the drain.
    assert whole.looked_at[check] - holed.looked_at[check] == (2 if check == "acknowledged" else 1)


@pytest.mark.parametrize(
    ("check", "kind"), [("acknowledged", Kind.SNAPSHOT_ACCEPTED), ("jobs", Kind.PUBLISHED)]
)
def test_a_hole_excuses_nothing_beyond_the_life_of_its_source(tell, tmp_path, check, kind):
    story = tell()
    del story.events[story.find(kind, block=0, version=20)]
    # Another service, long before, whose history has a hole.
    story.events[:0] = [
        dataclasses.replace(event, source="before", at=at, number=number)
        for number, (event, at) in enumerate(
            [(story.events[0], 10.0), (story.events[story.find(Kind.SERVICE_HELD)], 11.0),
             (story.events[story.find(Kind.SERVICE_HELD)], 12.0), (story.events[-1], 13.0)]
        )
    ]  # fmt: skip
    write = with_a_hole(story, "before", Kind.SERVICE_HELD)
    report = examine(write(tmp_path), expectations=expected(tmp_path))
    assert report.history.holes == 1
    assert check in {violation.check for violation in report.violations}


def test_a_short_life_has_no_percentile_and_waits_are_no_stall(tell, tmp_path):
    story = tell(stale_timeout=10.0)
    story.change(story.find(Kind.STEP_ENDED, 30), data={"seconds": 2.0})
    # Block 1 keeps its first version until it is beyond the bound, and is waited for then.
    step = 11 + BOUND
    story.events = [
        e for e in story.events if not (e.kind is Kind.ADOPTED and e.block == 1 and e.version in (20, 30))
    ]
    adopted = story.find(Kind.ADOPTED, block=1, step=step)
    story.insert(adopted, Kind.WAIT_BEGUN, "trainer", step=step, blocks=[1])
    ended = story.find(Kind.STEP_ENDED, step=step)
    story.insert(ended, Kind.WAIT_ENDED, "trainer", step=step, seconds=7.9, timed_out=False)
    story.change(ended + 1, data={"seconds": 8.0, "waited": 7.9})
    assert check_history(story.write(tmp_path), expectations=expected(tmp_path)) == []


def test_a_process_killed_in_a_step_broke_no_rule_and_a_wait_may_have_been_long(tell, tmp_path):
    story = tell(stale_timeout=10.0)
    index = story.find(Kind.STEP_ENDED, step=60)
    begun = story.events[story.find(Kind.STEP_BEGUN, step=60)]
    # What the trainer did after that step began is not told, as if it had been killed.
    told = [e for e in story.events[index + 1 :] if e.source != "trainer"]
    story.events = [*story.events[:index], *told]
    killed = dataclasses.replace(expected(tmp_path), killed=frozenset({2}))
    assert check_history(story.write(tmp_path), expectations=killed) == []
    # In the middle of a wait its other threads may go on for longer.
    story.insert(len(story.events) - 1, Kind.TRAINER_DETACHED, "trainer")
    story.change(len(story.events) - 2, at=begun.at + 6.5)
    found = check_history(story.write(tmp_path), expectations=killed)
    assert "step_time" in {violation.check for violation in found}
    story.insert(len(story.events) - 2, Kind.WAIT_BEGUN, "trainer", step=60, blocks=[0])
    found = check_history(story.write(tmp_path), expectations=killed)
    assert "step_time" not in {violation.check for violation in found}


def test_a_step_that_raised_is_timed_and_not_asked_what_it_applied(tell, tmp_path):
    story = tell()
    ended = {"used": None, "raised": True}
    # No policy acts in the step in which its block goes beyond the bound.
    story.events = [
        e for e in story.events if not (e.kind is Kind.ADOPTED and e.block == 1 and e.version in (20, 30))
    ]
    adopted = story.find(Kind.ADOPTED, block=1, version=40)
    late = story.events.pop(adopted)
    step = story.find(Kind.STEP_BEGUN, step=12 + BOUND)
    story.events.insert(step + 1, dataclasses.replace(late, step=12 + BOUND, at=story.events[step].at))
    story.change(story.find(Kind.STEP_ENDED, step=11 + BOUND), data=ended)
    assert check_history(story.write(tmp_path), expectations=expected(tmp_path)) == []
    story.change(story.find(Kind.STEP_ENDED, step=11 + BOUND), data={**ended, "seconds": 3.5})
    found = check_history(story.write(tmp_path), expectations=expected(tmp_path))
    assert [violation.check for violation in found] == ["step_time"]


def test_where_nobody_said_the_ridge_any_retry_may_have_been(tell, tmp_path):
    story = tell()
    everywhere(story, 0, 20, [story.save(story.root_of(0, 20, Ridge(value=1e-4)))])
    published = story.find(Kind.PUBLISHED, block=0, version=20)
    data = {name: value for name, value in story.events[published].data.items() if name != "retries"}
    story.events[published] = dataclasses.replace(story.events[published], data=data)
    assert check_history(story.write(tmp_path), expectations=expected(tmp_path)) == []


def test_as_many_roots_are_computed_again_as_are_asked_for(tell, tmp_path):
    paths = tell().write(tmp_path)
    adopted = 2 * 5
    for roots, looked_at in ((None, adopted), (3, 3), (1000, adopted)):
        report = examine(paths, expectations=expected(tmp_path, roots=roots))
        assert report.looked_at["roots"] == looked_at


def test_every_check_has_a_planted_fault(tell, tmp_path):
    report = examine(tell().write(tmp_path), expectations=expected(tmp_path))
    assert {parameters.values[0] for parameters in PLANTED} == set(report.looked_at)
