"""Every attack in short, on one real service. ``make abuse`` is the long form, with times that are judged.

Here a machine may be busy with other tests, so that the other job only has to be served all the while.
"""

from __future__ import annotations

import attacks
import pytest
from cases import CASES
from measure import MIB, SETTINGS, HonestJob, Outcome, judged, measure

from service_process import ServiceProcess

_FILLS = {
    attacks.dropped_sessions,
    attacks.unread_pushes,
    attacks.idle_connections,
    attacks.rapid_resets,
}
"""These leave no room for sessions, connections or new calls of other attacks.

Where resets come fast enough for the calls that wait to begin to reach their bound, gRPC ends others with
CANCELLED, and these would be taken for answers to the attacks beside.
"""

_DISPLACES = {attacks.silent_calls, attacks.silent_checks, attacks.trickled_calls}
"""These displace calls whose first message is on its way, also those of other attacks."""

_ONE_BY_ONE = [[case] for case in CASES if case.attack in _FILLS]
_DISPLACING = [case for case in CASES if case.attack in _DISPLACES]
_TOGETHER = [case for case in CASES if case.attack not in _FILLS | _DISPLACES]
_GROUPS = [*(_TOGETHER[start::4] for start in range(4)), _DISPLACING, *_ONE_BY_ONE]


@pytest.fixture(scope="module")
def attacked():
    with ServiceProcess(workers=2, arguments=SETTINGS) as service:
        yield service, HonestJob(service)


@pytest.mark.parametrize("cases", _GROUPS, ids=lambda cases: "-".join(c.attack.__name__ for c in cases))
def test_attacks_are_refused_within_the_memory_and_others_are_served(attacked, cases):
    # As many connections as are refused; of other attacks a part.
    scale = {case: 1.0 if case.attack in _FILLS else 0.4 for case in cases}
    for outcome in measure(*attacked, cases, 2.0, scale):
        assert not [fault for fault in outcome.faults if "slower" not in fault], outcome
        assert outcome.samples >= 3


@pytest.mark.parametrize(
    ("attack", "alone", "fair_share", "faults"),
    [
        (attacks.snapshot_floods, 0.06, 0.05, ["the other job is 2.20 times slower than at its fair share"]),
        (attacks.snapshot_floods, 0.06, 0.06, []),
        (
            attacks.snapshot_floods,
            0.05,
            0.04,
            [
                "the other job is 2.20 times slower",
                "the other job is 2.75 times slower than at its fair share",
            ],
        ),
        (attacks.status_calls, 0.06, 0.05, []),
    ],
)
def test_beside_a_job_that_floods_the_other_is_judged_by_its_fair_share_too(
    attack, alone, fair_share, faults
):
    case = next(case for case in CASES if case.attack is attack)
    saw = dict.fromkeys(case.expected, 1)
    assert judged(Outcome(case, saw, MIB, MIB, alone, 0.11, 9, [], fair_share), "").faults == faults
