"""A service of its own for a test, and a training beside it."""

from __future__ import annotations

import pytest

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
