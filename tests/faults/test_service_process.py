"""The service's process is killed, frozen, restarted and drained under a trainer that goes on."""

from __future__ import annotations

import signal

import pytest

from service_process import wait_for
from small_training import Training


@pytest.fixture
def training(service):
    run = Training(service.address)
    yield run
    run.optimizer.close()


def disconnected(training):
    return training.optimizer.metrics()["connected"] == 0


def test_killed_while_computing(service, training, fault_report):
    with fault_report.fault("service killed while computing") as fault:
        training.until_adopted(12)
        (actor,) = service.actors()
        actor.send_signal(signal.SIGSTOP)  # so that what it computes is surely under way
        training.for_seconds(1)
        fault.injected("SIGKILL of the server, its actor at work")
        service.kill()
        training.until(lambda: disconnected(training))
        fault.detected("the stream broke")
        wait_for(lambda: not service.survivors(), what="the end of Ray's processes")
        service.start()
        fault.lifted()
        training.until_adopted(12)
        fault.recovered("12 versions adopted", within=30)
        assert training.optimizer.metrics()["waits"] == 0
