"""Training goes on, step by step as fast as before, whatever happens to a real service beside it."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from service_process import ServiceProcess
from small_training import Training


@pytest.fixture
def service():
    with ServiceProcess() as running:
        yield running


@pytest.fixture
def training(service):
    run = Training(service.address)
    yield run
    run.optimizer.close()


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


def test_a_group_added_in_the_middle_joins_the_session(training):
    training.until_adopted(6)
    before = training.optimizer.metrics()
    extra = nn.Linear(8, 16)
    training.optimizer.add_param_group({"params": list(extra.named_parameters(prefix="extra"))})
    training.model.append(extra)
    training.y = torch.randn(len(training.x), 16)
    training.until(
        lambda: training.optimizer.metrics()["blocks_with_version"] == before["blocks"] + 1,
        what="a version of the new block",
    )
    metrics = training.optimizer.metrics()
    assert metrics["epoch"] > before["epoch"]
    training.until_adopted(6)


def test_beyond_the_bound_the_grafted_step_serves_until_the_service_is_back(service):
    training = Training(service.address, max_staleness=30, policy="graft")
    try:
        training.until_adopted(6)
        service.kill()
        training.until(lambda: training.optimizer.metrics()["blocks_grafted_stale"] > 0)
        assert training.optimizer.metrics()["age_max"] <= 30
        service.start()
        training.until_adopted(6)
    finally:
        training.optimizer.close()


def test_waiting_ends_when_the_service_is_back(service):
    training = Training(service.address, max_staleness=30, policy="wait", stale_timeout=60.0)
    try:
        training.until_adopted(6)
        service.freeze()
        thawed = []

        # The training thread itself is the one that waits.
        timer = threading.Timer(3.0, lambda: (service.thaw(), thawed.append(True)))
        timer.start()
        training.until(lambda: training.optimizer.metrics()["waits"] > 0)
        metrics = training.optimizer.metrics()
        assert thawed
        assert metrics["wait_timeouts"] == 0
        assert metrics["age_max"] <= 30
    finally:
        training.optimizer.close()


def test_training_starts_without_a_service_and_connects_when_it_can(caplog):
    service = ServiceProcess()
    training = Training(service.address)
    try:
        training.for_seconds(1)
        assert training.adopted() == 0
        warnings = [r for r in caplog.records if r.levelname == "WARNING"]
        assert len(warnings) == 1, [r.getMessage() for r in warnings]
        assert service.address in warnings[0].getMessage()
        service.start()
        training.until_adopted(6)
    finally:
        training.optimizer.close()
        service.stop()
