"""Training goes on whatever happens to a real service beside it."""

from __future__ import annotations

import threading
import time

import torch
from torch import nn

from service_process import ServiceProcess, wait_for
from small_training import Training


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

        def thaw_when_it_waits():
            wait_for(lambda: training.optimizer.metrics()["waits"] > 0)
            time.sleep(1.0)  # of the wait
            thawed.append(True)
            service.thaw()

        # The training thread itself is the one that waits.
        thawing = threading.Thread(target=thaw_when_it_waits)
        thawing.start()
        try:
            training.until(lambda: training.optimizer.metrics()["waits"] > 0)
            assert thawed
            assert max(training.seconds) > 0.5
        finally:
            thawing.join()
        metrics = training.optimizer.metrics()
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
