"""Real services in real subprocesses, one of them shared by all tests of a run."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from processes import command_line, family, kill
from raw_trainer import RawTrainer, wait_for

TOKEN = "a-token-of-the-tests-7f3a"
PREFIX = "PRECONDITIONER_SERVICE_"


class ServiceProcess:
    def __init__(
        self, directory: Path, *arguments: str, environment: dict[str, str | None] | None = None
    ) -> None:
        self.log_path = directory / f"{next(_numbers)}.log"
        clean = {key: value for key, value in os.environ.items() if not key.startswith(PREFIX)}
        variables = {**clean, f"{PREFIX}TOKEN": TOKEN, **(environment or {})}
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "preconditioner_service", "serve", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={name: value for name, value in variables.items() if value is not None},
                start_new_session=True,
            )
        self.line = json.loads(self.process.stdout.readline())
        self.address = self.line.get("address", "")

    def trainer(self, token: str = TOKEN, **options) -> RawTrainer:
        return RawTrainer(self.address, token, **options)

    def log(self) -> str:
        return self.log_path.read_text()

    def family(self) -> list[psutil.Process]:
        """The service and all of Ray's processes."""
        return family(self.process.pid)

    def workers(self) -> list[psutil.Process]:
        return [process for process in self.family() if "RootWorker" in command_line(process)]

    def end(self) -> None:
        members = self.family()
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(30)
        kill(members)
        self.process.wait(10)
        self.process.stdin.close()
        self.process.stdout.close()


_numbers = itertools.count()


@pytest.fixture(scope="session")
def _shared_service(tmp_path_factory):
    service = ServiceProcess(
        tmp_path_factory.mktemp("service"),
        "--num-workers=2",
        "--session-ttl=8",
        "--reflection",
        "--max-blocks=2000",
        "--max-side=2048",
        "--max-job-bytes=200000000",
        "--max-total-bytes=400000000",
        "--log-level=debug",
        "--batch-patience=8",
    )
    assert service.line["event"] == "ready", service.line
    yield service
    service.end()
    assert "Traceback" not in service.log(), "an exception that nobody handled"


@pytest.fixture
def service(_shared_service):
    """The shared one. No test may stop it; killing its workers is fine."""
    assert _shared_service.process.poll() is None, "a test before this one killed the shared service"
    return _shared_service


@pytest.fixture
def start(tmp_path):
    """Starts services of the test's own."""
    services = []

    def starter(*arguments: str, **options) -> ServiceProcess:
        services.append(ServiceProcess(tmp_path, *arguments, **options))
        return services[-1]

    yield starter
    for service in services:
        service.end()


@pytest.fixture
def trainer(service):
    """A connected trainer of the shared service; its session is closed afterwards."""
    trainer = service.trainer()
    yield trainer
    with contextlib.suppress(Exception):
        trainer.close()
    trainer.channel.close()


@pytest.fixture
def job(request):
    """A name of the test's own."""
    return "".join(letter if letter.isalnum() else "-" for letter in request.node.name)[:200]


@pytest.fixture
def all_workers(service, trainer):
    """Waits until every worker of the shared service lives."""
    wait_for(lambda: trainer.status().workers == 2)
