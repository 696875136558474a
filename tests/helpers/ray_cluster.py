"""A Ray cluster of several nodes on this machine, in a process of its own; nodes come and go on command.

``ray.cluster_utils.Cluster`` connects the process that makes it, and a test run must not be a Ray driver.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from processes import family, kill
from service_process import free_port, wait_for


class RayCluster:
    """A head and its nodes, with token authentication.

    Args:
        head_cpus: of the head's node.
    """

    def __init__(self, head_cpus: int = 1) -> None:
        # Not below pytest's directory: a unix socket's path must be short.
        self._directory = Path(tempfile.mkdtemp(prefix="raycl-", dir="/tmp"))
        self.port = free_port()
        self.environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        (self._directory / "ray").mkdir()
        self._log = (self._directory / "log").open("wb")
        self._process = subprocess.Popen(
            [sys.executable, "-u", __file__, str(self.port), str(head_cpus)],
            # The directory is where the cluster would say its address to every Ray of the machine.
            env={**clean, **self.environment, "RAY_TMPDIR": str(self._directory)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
        )
        try:
            self.address = self._answer()
        except BaseException:
            self.close()
            raise

    def add_node(self, cpus: int = 1) -> None:
        """Start another node."""
        self._do("add", cpus)

    def remove_node(self) -> None:
        """Kill the node that was added last."""
        self._do("remove")

    def kill_head(self) -> None:
        """Kill the head: its raylet, and what holds the cluster's state."""
        self._do("kill_head")

    def start_head(self, cpus: int = 1) -> None:
        """Start a head anew, at the same address; it knows nothing of the one before."""
        self._do("start_head", cpus)

    def close(self) -> None:
        """Kill everything. (Not by `ray stop`: that ends every Ray of the machine.)"""
        kill(reversed(family(self._process.pid)))
        self._process.wait(10)
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            pipe.close()
        _kill_holders(self._directory)
        shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> RayCluster:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _do(self, *command: Any) -> None:
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        self._answer()

    def _answer(self) -> str:
        line = self._process.stdout.readline().rstrip()
        assert line, (self._directory / "log").read_text(errors="replace")[-3000:]
        return line


def _kill_holders(directory: Path) -> None:
    """Ray's processes are not all children of whoever started them; each has a log open here."""
    from preconditioner_service.reaper import holders

    def none_left() -> bool:
        left = list(holders(str(directory), {os.getpid()}))
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not left

    wait_for(none_left, what="the end of the cluster's processes")


def main(port: str, head_cpus: str) -> None:
    """Obey lines of JSON on stdin, each with one line on stdout."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    store = 80 * 1024 * 1024

    def start_head(cpus: int) -> None:
        cluster.add_node(
            num_cpus=cpus,
            gcs_server_port=int(port),
            include_dashboard=False,
            object_store_memory=store,
        )

    def say() -> None:
        out.write(f"{cluster.address}\n")
        out.flush()

    start_head(int(head_cpus))
    nodes = []
    say()
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        if command == "add":
            nodes.append(cluster.add_node(num_cpus=arguments[0], object_store_memory=store))
        elif command == "remove":
            cluster.remove_node(nodes.pop(), allow_graceful=False)
        elif command == "kill_head":
            cluster.head_node.kill_all_processes(check_alive=False, allow_graceful=False)
            cluster.head_node = None
        elif command == "start_head":
            start_head(arguments[0])
        say()


if __name__ == "__main__":
    main(*sys.argv[1:])
