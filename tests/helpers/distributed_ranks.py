"""Several ranks of one test: real processes, each running the same scenarios.

Starting ranks takes seconds, so one start runs all scenarios of a module: functions that its ``SCENARIOS``
lists, each called on every rank with a folder that all ranks share. The ranks have the environment that
torchrun gives; the examples are run under torchrun itself.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path

import torch.distributed as dist

import distributed_main
from forks import end_fork, start_fork


class Outcome:
    """What the ranks printed, which scenarios passed, and how the processes ended.

    Args:
        output: of all ranks.
        statuses: exit status by rank.
    """

    def __init__(self, output: str, statuses: Sequence[int | None]) -> None:
        self.output = output
        self.statuses = list(statuses)
        self.passed = {line.split()[1] for line in output.splitlines() if line.startswith("PASSED ")}
        self.failed = {line.split()[1] for line in output.splitlines() if line.startswith("FAILED ")}

    def require(self, scenario: str) -> None:
        assert scenario in self.passed, f"{scenario} did not pass:\n{self.output[-8000:]}"
        # A scenario that failed ends the ranks too, and is the one to blame.
        assert self.failed or not any(self.statuses), (
            f"ranks ended with the statuses {self.statuses}:\n{self.output[-8000:]}"
        )


def run_ranks(
    module: str, ranks: int, folder: Path, *only: str, timeout: float = 90.0, **environment: str
) -> Outcome:
    """Run the scenarios of a module on that many ranks, until one fails. Nothing outlives the call."""
    # The launcher's, as torchrun's is: so its port is surely free.
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    output = folder / f"output-of-{ranks}-ranks.txt"
    output.unlink(missing_ok=True)
    deadline = time.monotonic() + timeout
    processes = []
    try:
        for rank in range(ranks):
            own = {**_as_torchrun(rank, ranks, store.port, folder), **environment}
            processes.append(
                start_fork(
                    distributed_main.main,
                    module,
                    folder,
                    only,
                    output=output,
                    errors=output,
                    environment=own,
                )
            )
        running = {process.sentinel: process for process in processes}
        while running and (ended := wait(list(running), max(0.0, deadline - time.monotonic()))):
            # The others may wait for one that failed, in a collective.
            if any(running.pop(sentinel).exitcode for sentinel in ended):
                break
        late = bool(running) and time.monotonic() >= deadline
    finally:
        for process in processes:
            end_fork(process)
    text = output.read_text() + (f"\nended after {timeout} s" if late else "")
    return Outcome(text, [process.exitcode for process in processes])


def _as_torchrun(rank: int, ranks: int, port: int, folder: Path) -> dict[str, str]:
    """What ``torchrun --standalone`` adds to the environment of a rank, and the loopback for gloo."""
    return {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "ROLE_RANK": str(rank),
        "ROLE_NAME": "default",
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "GROUP_WORLD_SIZE": "1",
        "ROLE_WORLD_SIZE": str(ranks),
        "TORCHELASTIC_RUN_ID": "tests",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT",
        "TORCHELASTIC_ERROR_FILE": str(folder / f"error-of-rank-{rank}.json"),
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    }
