"""A private service: a subprocess on loopback that lives no longer than this process.

``python -m preconditioner_service serve --port 0 --parent-pid PID`` prints one line of JSON to its standard
output once it is ready, ``{"event": "ready", "address": ...}``, or ``{"event": "failed", "reason": ...}``. It
ends by itself when its parent is gone or its standard input ends, and the kernel sees to the latter even when
this process is killed with SIGKILL.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from preconditioner_client.exchange import ExchangeError
from preconditioner_client.relay import Relay

logger = logging.getLogger("preconditioner_client")

# A service that was told to end ends hard by itself after 8 s.
_TERM_SECONDS = 10.0
_KILL_SECONDS = 2.0
_POLL_SECONDS = 0.1
_FIRST_PAUSE = 0.5
_LONGEST_PAUSE = 30.0
_STEADY_SECONDS = 60.0
_DIRECTORY_PREFIX = "preconditioner-embedded-"
_LOCK = "lock"
_ENV_PREFIX = "PRECONDITIONER_SERVICE_"
# What of a service's settings in our environment may tune an embedded one. The others (port, token, TLS) are
# meant for a service in its own right and would make this one unreachable.
_INHERITED = frozenset(
    _ENV_PREFIX + name
    for name in (
        "LOG_LEVEL",
        "RAY_ADDRESS",
        "NUM_WORKERS",
        "CPUS_PER_WORKER",
        "WORKER_NICE",
        "OBJECT_STORE_BYTES",
        "HISTORY_FILE",
        "HISTORY_MATRICES",
    )
)
_NICENESS = {_ENV_PREFIX + "WORKER_NICE": "15"}
"""Training goes first: roots take what it leaves of the cores."""


class EmbeddedService:
    """Starts the subprocess, starts it again whenever it dies, and ends it.

    All waiting is in a thread of its own. The token stays the same over restarts; the address does not.

    Args:
        workers: actors that compute roots; None: the service decides.
        start_timeout: seconds from start to the ready line.
        command: in place of the installed service, for tests.
    """

    def __init__(
        self, workers: int | None = None, start_timeout: float = 300.0, command: Sequence[str] | None = None
    ) -> None:
        self.token = secrets.token_urlsafe(32)
        self._command = list(command) if command is not None else _command(workers)
        self._start_timeout = start_timeout
        self._owner = os.getpid()
        self._changed = threading.Condition()
        self._address: str | None = None
        self._failure: str | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._lifeline = -1
        self._stopping = False
        _sweep()
        self._directory = tempfile.mkdtemp(prefix=_DIRECTORY_PREFIX)
        # Held for as long as this process lives, so that others know that the directory is in use; and before
        # they can see it, as ranks of one host start at one moment.
        lock = Path(self._directory) / _LOCK
        self._lock = os.open(lock.with_suffix(".new"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        lock.with_suffix(".new").rename(lock)
        self._thread = threading.Thread(target=self._keep, name="preconditioner-embedded", daemon=True)
        _live.append(self)
        logger.info(
            "an embedded preconditioner service is being started, which takes some seconds; until it has "
            "sent preconditioners, steps are those of the grafted diagonal method. Its output is in %s",
            self.log_path,
        )
        self._thread.start()

    @property
    def pid(self) -> int | None:
        """Process id of the service, if one is running."""
        process = self._process
        return None if process is None else process.pid

    @property
    def log_path(self) -> Path:
        """File with the latest output of the service; removed with it."""
        return Path(self._directory) / "service.log"

    def locate(self, timeout: float) -> tuple[str, str] | None:
        """Address and token, as :class:`endpoint.Endpoint` has it.

        Raises:
            ExchangeError: the service could not be started for the first time; with the reason.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._address or self._failure or self._stopping, timeout)
            if self._failure is not None:
                raise ExchangeError(self._failure)
            return None if self._address is None else (self._address, self.token)

    def close(self) -> None:
        """End the service: SIGTERM, and SIGKILL if that is not enough. Bounded; idempotent."""
        if self._owner != os.getpid():
            return
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
            if self._process is not None:
                _signal(self._process, signal.SIGTERM)
        self.abandon()  # the service need not finish work that nobody waits for
        self._thread.join(_TERM_SECONDS)
        if self._thread.is_alive():
            logger.warning("the embedded preconditioner service ignores SIGTERM; it is killed")
            with self._changed:
                if self._process is not None:
                    _signal(self._process, signal.SIGKILL)
            self._thread.join(_KILL_SECONDS)
        if not self._thread.is_alive() and self in _live:
            _live.remove(self)
            shutil.rmtree(self._directory, ignore_errors=True)
            os.close(self._lock)

    def abandon(self) -> None:
        """Give up our end of the lifeline. In a forked child too: then it hangs on the parent alone."""
        lifeline, self._lifeline = self._lifeline, -1
        if lifeline >= 0:
            os.close(lifeline)

    # -- the keeper's thread -------------------------------------------------------------------------

    def _keep(self) -> None:
        pause = _FIRST_PAUSE
        ready_before = False
        while not self._stopping:
            began = time.monotonic()
            reason = self._live_once()
            if self._stopping:
                return
            with self._changed:
                if self._address is None and not ready_before:
                    self._failure = f"the embedded preconditioner service could not be started: {reason}"
                    self._changed.notify_all()
                    return
                self._address = None
            ready_before = True
            logger.warning("the embedded preconditioner service ended (%s); it is started again", reason)
            if time.monotonic() - began > _STEADY_SECONDS:
                pause = _FIRST_PAUSE
            with self._changed:
                self._changed.wait_for(lambda: self._stopping, pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _live_once(self) -> str:
        """Start the service and stay until it ends; why it ended."""
        try:
            process = self._spawn()
        except OSError as error:
            return f"{self._command[0]}: {error.strerror}"
        assert process.stdout is not None
        assert process.stderr is not None
        relay = Relay(self.log_path)
        errors = threading.Thread(target=relay.run, args=(process.stderr,), daemon=True)
        errors.start()
        output = threading.Thread(target=self._read_output, args=(process.stdout, relay), daemon=True)
        output.start()
        try:
            ready = self._await_ready(process, relay)
            if not ready:
                _signal(process, signal.SIGTERM)
            code = self._reap(process, patient=ready)
        finally:
            self.abandon()
            # Its own children may hold the pipes open for a while; what they say is of no use any more.
            errors.join(1.0)
            output.join(1.0)
            relay.close()
        reason = relay.reason or _exit_reason(code)
        return f"{reason}. Last lines of its output, in full in {self.log_path}:\n{relay.tail()}"

    def _spawn(self) -> subprocess.Popen[bytes]:
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(_ENV_PREFIX) or name in _INHERITED
        }
        environment = _NICENESS | inherited
        environment[_ENV_PREFIX + "TOKEN"] = self.token
        stdin, lifeline = os.pipe()
        try:
            process = subprocess.Popen(
                self._command,
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment,
                # `python -m` searches the working directory first; an empty one shadows nothing.
                cwd=self._directory,
                # Ctrl-C in the terminal is for the trainer, which ends the service when it is done.
                start_new_session=True,
            )
        except BaseException:
            os.close(lifeline)
            raise
        finally:
            os.close(stdin)
        self._lifeline = lifeline
        with self._changed:
            self._process = process
            stopping = self._stopping
        if stopping:
            _signal(process, signal.SIGTERM)
        return process

    def _read_output(self, stream: IO[bytes], relay: Relay) -> None:
        """Wait for the ready line; what follows it is log."""
        for raw in stream:
            event = _event(raw)
            if event is None:
                relay.write(raw)
                continue
            with self._changed:
                if event.get("event") == "ready":
                    self._address = str(event.get("address"))
                else:
                    relay.reason = str(event.get("reason"))
                self._changed.notify_all()
            break
        relay.run(stream)
        with self._changed:
            self._changed.notify_all()

    def _await_ready(self, process: subprocess.Popen[bytes], relay: Relay) -> bool:
        deadline = time.monotonic() + self._start_timeout
        with self._changed:
            while self._address is None and relay.reason is None and not self._stopping:
                if time.monotonic() > deadline:
                    relay.reason = (
                        f"it was not ready within {self._start_timeout:g} s; on a machine that is this slow "
                        f"raise ServiceConfig(start_timeout=...)"
                    )
                elif _has_ended(process):
                    break
                else:
                    self._changed.wait(_POLL_SECONDS)
            return self._address is not None

    def _reap(self, process: subprocess.Popen[bytes], patient: bool) -> int:
        """Wait for the end, bounded if not ``patient``; the exit status."""
        deadline = time.monotonic() + _TERM_SECONDS
        while not _has_ended(process, block=patient):
            if time.monotonic() > deadline:
                _signal(process, signal.SIGKILL)
            time.sleep(_POLL_SECONDS)
        # What it left behind of its process group. Its id cannot have another owner before wait().
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with self._changed:
            self._process = None
        return process.wait()


_live: list[EmbeddedService] = []


def _abandon_all() -> None:
    for service in _live:
        service.abandon()
    _live.clear()


os.register_at_fork(after_in_child=_abandon_all)


def _sweep() -> None:
    """Remove the directories of processes that were killed."""
    for path in Path(tempfile.gettempdir()).glob(f"{_DIRECTORY_PREFIX}*"):
        try:
            lock = os.open(path / _LOCK, os.O_RDWR | os.O_CLOEXEC)
        except OSError:  # another user's, or just being made or removed
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except BlockingIOError:
            pass  # in use
        finally:
            os.close(lock)


def _command(workers: int | None) -> list[str]:
    command = [sys.executable, "-m", "preconditioner_service", "serve", "--port", "0"]
    command += ["--parent-pid", str(os.getpid())]
    if workers is not None:
        command += ["--num-workers", str(workers)]
    return command


def _event(raw: bytes) -> dict[str, object] | None:
    try:
        event = json.loads(raw)
    except ValueError:
        return None
    return event if isinstance(event, dict) and event.get("event") in ("ready", "failed") else None


def _exit_reason(code: int | None) -> str:
    if code is not None and code < 0:
        return f"it was killed by {signal.Signals(-code).name}"
    return f"it exited with status {code}"


def _has_ended(process: subprocess.Popen[bytes], block: bool = False) -> bool:
    """Whether it ended; leaves it to be waited for, so that its id still names it."""
    options = os.WEXITED | os.WNOWAIT | (0 if block else os.WNOHANG)
    try:
        return os.waitid(os.P_PID, process.pid, options) is not None
    except ChildProcessError:  # somebody reaped it, or SIGCHLD is ignored
        return True


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, number)  # send_signal() would reap it
