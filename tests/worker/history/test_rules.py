"""Every check finds the fault that is planted for it, and nothing in a history without one."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from history_story import BOUND, LIFE, SIDE, good_story
from preconditioner_protos.history import Kind, Scope
from preconditioner_worker.history import Expectations, check_history, examine
from preconditioner_worker.history.rules import CHECKS

PLANTED = []


def planted(check, rule, *, settings=None, **expectations):
    """A function that spoils a good story in one way."""

    def register(function):
        PLANTED.append(
            pytest.param(
                check, rule, function, settings or {}, expectations, id=f"{check}: {function.__name__}"
            )
        )
        return function

    return register


def expected(tmp_path, **expectations):
    return Expectations(matrices=tmp_path / "matrices", recovery_seconds=0.1, **expectations)


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


@planted("waits", 1)
def a_wait_longer_than_its_timeout(story):
    step = story.find(Kind.STEP_ENDED, step=25)
    story.insert(step, Kind.WAIT_ENDED, "trainer", step=25, seconds=60.0, timed_out=True)


@planted("step_time", 1)
def one_stall_in_a_long_life(story):
    story.change(story.find(Kind.STEP_ENDED, 30), data={"seconds": 3.5})


@planted("step_time", 1, step_count=60)
def slow_steps(story):
    for position in range(4):
        story.change(story.find(Kind.STEP_ENDED, position), data={"seconds": 2.0})


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


@pytest.mark.parametrize(("check", "rule", "spoil", "settings", "expectations"), PLANTED)
def test_a_planted_fault_is_found(tell, tmp_path, check, rule, spoil, settings, expectations):
    story = tell(**settings)
    spoil(story)
    found = check_history(story.write(tmp_path), expectations=expected(tmp_path, **expectations))
    assert (check, rule) in {(violation.check, violation.rule) for violation in found}
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
    story = tell()
    story.change(story.find(Kind.STEP_ENDED, 30), data={"seconds": 2.0})
    story.change(story.find(Kind.STEP_ENDED, 31), data={"seconds": 8.0, "waited": 7.9})
    assert check_history(story.write(tmp_path), expectations=expected(tmp_path)) == []


def test_every_check_has_a_planted_fault(tell, tmp_path):
    report = examine(tell().write(tmp_path), expectations=expected(tmp_path))
    assert {parameters.values[0] for parameters in PLANTED} == set(report.looked_at)
