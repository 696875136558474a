"""A real ``preconditioner-service serve`` in a process of its own, to be killed, frozen and started again."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from preconditioner_worker.faults import service
from processes import alive, command_line, kill

TOKEN = "a-token-for-tests-only-0123456789"


_given: set[int] = set()


def free_port() -> int:
    """One that nobody has, for who binds it later.

    Each process of a test run has a part of the range of its own, and gives none away twice.
    """
    part = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 12
    while (port := service.free_port(20_000 + 1000 * part, 1000)) in _given:
        pass
    _given.add(port)
    return port


def wait_for(condition, timeout=60.0, what="the condition"):
    """Poll until ``condition()`` is true; returns its value."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not come true within {timeout} s")
        time.sleep(0.05)


def _temporary_log() -> str:
    handle, path = tempfile.mkstemp(prefix="service-", suffix=".log")
    os.close(handle)
    return path


class ServiceProcess:
    """One service on a fixed loopback port. ``start`` returns when it is ready.

    Args:
        workers: Ray actors.
        port: default a free one.
        arguments: more of ``serve``.
        environment: more variables.
        host: where it listens.
        prefix: stands before its command.
        log: file for its log; default a temporary one.
    """

    def __init__(
        self,
        workers: int = 1,
        port: int | None = None,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        host: str = "127.0.0.1",
        prefix: Sequence[str] = (),
        log: str | None = None,
    ) -> None:
        self.prefix = list(prefix)
        self.port = port or free_port()
        self.workers = workers
        self.arguments = ["--host", host, *arguments]
        self.environment = dict(environment or {})
        self.address = f"{host}:{self.port}"
        self.process: subprocess.Popen[str] | None = None
        self._family: list[psutil.Process] = []
        self._own_log = log is None
        self._log = log or _temporary_log()

    @property
    def log(self) -> str:
        return Path(self._log).read_text(errors="replace")

    def start(self) -> ServiceProcess:
        command = [
            *self.prefix, sys.executable, "-m", "preconditioner_service", "serve",
            "--port", str(self.port), "--num-workers", str(self.workers),
            # It must not outlive a test run that is killed.
            "--parent-pid", str(os.getpid()),
            *self.arguments,
        ]  # fmt: skip
        with Path(self._log).open("a") as log:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, "PRECONDITIONER_SERVICE_TOKEN": TOKEN, **self.environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        line = self.process.stdout.readline()
        assert line, self.log[-3000:]
        ready = json.loads(line)
        assert ready["event"] == "ready", line
        self._family = psutil.Process(self.process.pid).children(recursive=True)
        return self

    def family(self, title: str) -> list[psutil.Process]:
        """Ray's processes with this in their command lines, as they are now."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        return [process for process in family if title in command_line(process)]

    def actors(self) -> list[psutil.Process]:
        """The processes that compute roots."""
        return self.family("RootWorker")

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """As a crash would: SIGKILL, without notice."""
        self.signal(signal.SIGKILL)
        self.process.wait(30)

    def freeze(self) -> None:
        self.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.signal(signal.SIGCONT)

    def survivors(self) -> list[psutil.Process]:
        """Ray's processes that outlived the service."""
        return [process for process in self._family if alive(process)]

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self.thaw()
                self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.kill()
        if self.process is not None:
            for pipe in (self.process.stdin, self.process.stdout):
                if pipe is not None:
                    pipe.close()
        kill(self.survivors())
        if self._own_log:
            Path(self._log).unlink(missing_ok=True)

    def __enter__(self) -> ServiceProcess:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()
