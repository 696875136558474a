"""A service of one's own on loopback, to be killed, frozen and started again at the same address."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

_STOP_SECONDS = 30.0


def free_port(first: int = 20_000, count: int = 12_000) -> int:
    """A port of this range that nobody has, for who binds it seconds later.

    By default between Ray's range and the one that systems choose from, so that nobody gets it by chance.
    """
    while True:
        port = first + secrets.randbelow(count)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class ServiceError(RuntimeError):
    """The service could not be started; the message says why."""


class LocalService:
    """``preconditioner-service serve`` as a subprocess that ends with this process at the latest.

    Args:
        workers: Ray actors.
        arguments: more of ``serve``.
        log: file that its log is appended to; None: nowhere.

    Attributes:
        address: ``host:port``, the same over restarts.
        token: that it asks for.
    """

    def __init__(self, workers: int = 1, arguments: Sequence[str] = (), log: Path | None = None) -> None:
        self._port = free_port()
        self.address = f"127.0.0.1:{self._port}"
        self.token = secrets.token_urlsafe(32)
        self._workers = workers
        self._arguments = tuple(arguments)
        self._log = log or Path(os.devnull)
        self._process: subprocess.Popen[str] | None = None

    @property
    def pid(self) -> int:
        """Of the server process.

        Raises:
            ServiceError: it does not run.
        """
        if self._process is None:
            raise ServiceError("the service does not run")
        return self._process.pid

    def start(self) -> None:
        """Start it, and return when it is ready.

        Raises:
            ServiceError: it did not become ready.
        """
        environment = {name: value for name, value in os.environ.items() if not name.startswith(_PREFIX)}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    sys.executable, "-m", "preconditioner_service", "serve",
                    "--port", str(self._port), "--num-workers", str(self._workers),
                    "--parent-pid", str(os.getpid()), *self._arguments,
                ],
                env={**environment, f"{_PREFIX}TOKEN": self.token},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )  # fmt: skip
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        entry = json.loads(line) if line else {"reason": "it ended without a word"}
        if entry.get("event") != "ready":
            raise ServiceError(f"the service could not be started: {entry.get('reason')}")

    def kill(self) -> None:
        """As a crash would: SIGKILL, without notice."""
        if self._process is not None:
            self._process.kill()
            self._reap(self._process)

    def freeze(self) -> None:
        """SIGSTOP."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)

    def stop(self) -> None:
        """End it in order, or hard if that takes too long. Idempotent."""
        if self._process is None:
            return
        self.thaw()
        self._signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_SECONDS)
        self.kill()

    def __enter__(self) -> LocalService:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)

    def _reap(self, process: subprocess.Popen[str]) -> None:
        process.wait(_STOP_SECONDS)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        self._process = None


_PREFIX = "PRECONDITIONER_SERVICE_"
