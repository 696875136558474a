"""Several ranks of one test: real processes under torchrun, each running one named function of a file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

_HELPERS = Path(__file__).parent
_RUNNER = _HELPERS / "distributed_main.py"


def run_ranks(script: str | Path, scenario: str, ranks: int, *arguments: object, timeout: float = 60.0) -> str:
    """Run ``scenario(*arguments)`` of ``script`` on every rank; returns what they printed.

    A failure on any rank fails the test with all that was printed. Nothing outlives the call.
    """
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
        str(_RUNNER), str(script), scenario, *map(str, arguments),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(_HELPERS), "GLOO_SOCKET_IFNAME": "lo"}
    # A session of its own, so that torchrun and all ranks can be ended together.
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"{scenario} took longer than {timeout} s:\n{output[-6000:]}") from None
    assert process.returncode == 0, f"{scenario} failed:\n{output[-6000:]}"
    return output
