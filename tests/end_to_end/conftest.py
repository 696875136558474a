"""A service that the tests of a module share, and a training beside it."""

from __future__ import annotations

import pytest

from service_process import ServiceProcess
from small_training import Training


@pytest.fixture(scope="module")
def _service():
    with ServiceProcess() as running:
        yield running


@pytest.fixture
def service(_service):
    """It runs, whatever a test before did to it."""
    if _service.process.poll() is None:
        _service.thaw()
    else:
        _service.start()
    return _service


@pytest.fixture
def training(service):
    run = Training(service.address)
    yield run
    run.optimizer.close()
