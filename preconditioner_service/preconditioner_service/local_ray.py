"""A private Ray on this machine, apart from any other Ray that runs or is configured here.

Nothing is asked of the user: the token that Ray's authentication wants is random and lives in this process's
environment (and its children's) alone, so neither ``$HOME`` nor a token file is needed. Everything that Ray
writes lies in a directory of mode 0700. Processes and directory end with the service, however it ends: see
:mod:`preconditioner_service.reaper`.
"""

from __future__ import annotations

import logging
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import MutableMapping
from pathlib import Path

from preconditioner_service import reaper
from preconditioner_service.logs import event

_PREFIX = "preco-"
_LONGEST_BASE = 24
"""Characters. Ray's sockets are 80 characters below it, and a unix socket's path has room for 107."""

_REAP_SECONDS = 12.0

_ATTEMPTS = 3
"""Ray gives its processes 30 s to start, which on a machine where much else starts may be too little."""

_MOST_WHY = 500
"""Characters of what Ray says."""


NICENESS = "RAY_worker_niceness"
"""Variable of Ray: the niceness of its workers, 15 by default. At that, whatever else keeps the cores busy
leaves them a thirtieth of the time, and the service itself is among it. Ray adds it to what its
workers inherit."""


def private_environment(environ: MutableMapping[str, str], worker_nice: int = 0) -> None:
    """Make Ray, not yet imported, a private one.

    Whatever configures another Ray is dropped: a trainer may itself run in a Ray job, and its address, job
    and token would leak into this one.
    """
    for name in [name for name in environ if name.startswith("RAY_")]:
        del environ[name]
    environ["RAY_AUTH_MODE"] = "token"
    environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    # No cluster: then all of Ray's ports are bound to the loopback address. The name is of other systems,
    # where that is the default.
    environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
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
    environ[NICENESS] = str(worker_nice)


class RayDirectory:
    """Ray's directory, and the reaper that sees to its end.

    Attributes:
        path: ours alone.
        ray: below it, for Ray, which opens its own directory to every user of the machine.
    """

    def __init__(self) -> None:
        base = Path(tempfile.gettempdir())
        if len(str(base)) > _LONGEST_BASE:
            base = Path("/tmp")
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
        self.ray = self.path / "r"
        self._reaper = subprocess.Popen(
            [sys.executable, "-I", "-S", reaper.__file__, str(self.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            # Not in our process group, which may be ended as a whole.
            start_new_session=True,
        )

    def remove(self) -> None:
        """End what is left of Ray, and remove the directory. Blocks for as long as that takes."""
        assert self._reaper.stdin is not None
        self._reaper.stdin.close()
        self._reaper.wait(_REAP_SECONDS)


def start_private_ray(num_cpus: int, object_store_bytes: int, worker_nice: int = 0) -> RayDirectory:
    """Start a private Ray and connect to it; returns its directory, whose removal ends it.

    Args:
        num_cpus: of its one node.
        object_store_bytes: of shared memory.
        worker_nice: niceness of its workers, on top of this process's.

    Raises:
        Exception: whatever Ray raised the last time.
    """
    private_environment(os.environ, worker_nice)
    import ray  # after the environment is set, which it reads when imported

    # Before Ray is initialised, or it complains of not being in the main thread, where signals are ours.
    logging.getLogger("ray").setLevel(logging.ERROR)
    attempt = 0
    while True:
        attempt += 1
        directory = RayDirectory()
        try:
            ray.init(
                address="local",
                num_cpus=num_cpus,
                num_gpus=0,
                object_store_memory=object_store_bytes,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=str(directory.ray),
            )
            return directory
        except Exception as error:
            ray.shutdown()
            directory.remove()
            if attempt == _ATTEMPTS:
                raise
            event(logging.WARNING, "ray did not start", attempt=attempt, why=str(error)[:_MOST_WHY])
