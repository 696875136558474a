"""A service that is gone costs no step time. Needs a machine on which nothing else begins meanwhile."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(autouse=True)
def small_heap():
    """What pytest and its plugins hold is out of the garbage collector's way.

    One pass over it takes 0.2 s, which falls into a step before or into one during, or into none.
    """
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def report(capsys):
    """Prints the slowest steps, also where the test passes, and returns their ratio."""

    def show(name, before, during):
        slowest_before, slowest_during = max(before) * 1e3, max(during) * 1e3
        with capsys.disabled():
            print(
                f"\n{name}: slowest step {slowest_before:.2f} ms before ({len(before)} steps), "
                f"{slowest_during:.2f} ms during ({len(during)} steps), "
                f"ratio {slowest_during / slowest_before:.2f}"
            )
        return slowest_during / slowest_before

    return show


def test_a_killed_service_costs_no_step_time_and_versions_arrive_again(service, training, report):
    training.until_adopted(12)
    before = training.until_adopted(30) + training.for_seconds(5)
    service.kill()
    adopted = training.adopted()
    during = training.for_seconds(5)
    assert training.optimizer.metrics()["connected"] == 0
    assert training.adopted() <= adopted + training.optimizer.metrics()["blocks"]
    service.start()
    during += training.until_adopted(6)
    metrics = training.optimizer.metrics()
    assert metrics["waits"] == 0
    assert metrics["connections"] >= 2
    # Starting again takes a core or two for some seconds, which the freeze below does not.
    assert report("kill -9", before, during) <= 2.0


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_frozen_service_costs_no_step_time_within_the_bound(service, training, report):
    training.until_adopted(12)
    before = training.for_seconds(20)
    service.freeze()
    during = training.for_seconds(20)
    service.thaw()
    metrics = training.optimizer.metrics()
    assert metrics["waits"] == 0
    assert report("SIGSTOP for 20 s", before, during) <= 1.5
    training.until_adopted(3)
