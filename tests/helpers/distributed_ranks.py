"""Several ranks of one test: real processes under torchrun, each running the same scenarios.

Starting ranks takes seconds, so one start runs all scenarios of a module: functions that its ``SCENARIOS``
lists, each called on every rank with a folder that all ranks share.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import psutil

_HELPERS = Path(__file__).parent


class Outcome:
    """What the ranks printed, and which scenarios passed."""

    def __init__(self, output: str) -> None:
        self.output = output
        self.passed = {line.split()[1] for line in output.splitlines() if line.startswith("PASSED ")}

    def require(self, scenario: str) -> None:
        assert scenario in self.passed, f"{scenario} did not pass:\n{self.output[-8000:]}"


def run_ranks(
    module: str, ranks: int, folder: Path, *only: str, timeout: float = 90.0, **environment: str
) -> Outcome:
    """Run the scenarios of a module on that many ranks, until one fails. Nothing outlives the call."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
        str(_HELPERS / "distributed_main.py"), module, str(folder), *only,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **environment}
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        # The ranks are in sessions of their own.
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        output, _ = process.communicate()
        output += f"\nended after {timeout} s"
    return Outcome(output)
