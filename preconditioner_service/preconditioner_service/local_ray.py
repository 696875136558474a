"""A private Ray on this machine, apart from any other Ray that runs or is configured here.

Nothing is asked of the user: the token that Ray's authentication wants is random and lives in this process's
environment (and its children's) alone, so neither ``$HOME`` nor a token file is needed. Everything that Ray
writes lies in a directory of mode 0700, removed at the end; what services that were killed left behind is
removed by the next one to start.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import tempfile
from collections.abc import MutableMapping
from pathlib import Path

_PREFIX = "preco-"
_LOCK = "lock"
_LONGEST_BASE = 24
"""Characters. Ray's sockets are 80 characters below it, and a unix socket's path has room for 107."""


def private_environment(environ: MutableMapping[str, str]) -> None:
    """Make Ray, not yet imported, a private one.

    Whatever configures another Ray is dropped: a trainer may itself run in a Ray job, and its address, job
    and token would leak into this one.
    """
    for name in [name for name in environ if name.startswith("RAY_")]:
        del environ[name]
    environ["RAY_AUTH_MODE"] = "token"
    environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    # Or it prints a stack on SIGTERM, which here is no failure.
    environ["RAY_DISABLE_FAILURE_SIGNAL_HANDLER"] = "1"
    # gRPC, which Ray holds too, must not take part in the forks of Ray's processes: they only exec.
    environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
    environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Nobody scrapes a private Ray.
    environ["RAY_enable_metrics_collection"] = "0"
    # Ray kills its workers when the machine's memory runs low. Here that would be the trainer's doing, and
    # what this service holds is bounded anyway.
    environ["RAY_memory_monitor_refresh_ms"] = "0"


class TemporaryDirectory:
    """Ray's directory. A lock held on a file in it tells that its service lives."""

    def __init__(self) -> None:
        base = Path(tempfile.gettempdir())
        if len(str(base)) > _LONGEST_BASE:
            base = Path("/tmp")
        _sweep(base)
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
        self._lock = os.open(self.path / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def remove(self) -> None:
        """Remove the directory; Ray must have ended."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _sweep(base: Path) -> None:
    for path in base.glob(f"{_PREFIX}*"):
        try:
            if path.stat().st_uid != os.geteuid():
                continue
            lock = os.open(path / _LOCK, os.O_RDWR | os.O_CLOEXEC)
        except OSError:  # another user's, just being made, or just removed
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except BlockingIOError:
            pass  # its service lives
        finally:
            os.close(lock)
