"""What losing the service costs the steps of a training that stays within its staleness bound."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from rich.table import Table

from preconditioner_client import ServiceConfig, Shampoo, StalenessConfig
from preconditioner_worker.faults.service import LocalService, ServiceError
from preconditioner_worker.results import write_text
from preconditioner_worker.workloads import Workload

_LONGEST_SECONDS = 300.0
"""Until the first versions, and until fresh ones after the outage."""


How: TypeAlias = Literal["kill", "freeze"]
"""The service is lost by SIGKILL and started again afterwards; or by SIGSTOP, so that connections stand and
nothing answers, and SIGCONT afterwards."""


class OutageError(ServiceError):
    """The measurement proves nothing; the message says why."""


class Window(BaseModel):
    """Whole steps (forward, backward, optimizer) of a part of the run.

    Attributes:
        name: which.
        steps: made in it.
        median_ms: of them.
        p99_ms: of them.
        slowest_ms: of them.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    steps: int
    median_ms: float
    p99_ms: float
    slowest_ms: float

    @classmethod
    def of(cls, name: str, seconds: Sequence[float]) -> Window:
        """Of step durations in seconds."""
        median, p99, slowest = np.percentile(np.asarray(seconds) * 1e3, [50, 99, 100])
        return cls(
            name=name,
            steps=len(seconds),
            median_ms=round(float(median), 3),
            p99_ms=round(float(p99), 3),
            slowest_ms=round(float(slowest), 3),
        )


class OutageBenchmark(BaseModel):
    """The result as JSON.

    Attributes:
        workload: that was trained.
        how: the service was lost.
        seconds: of the outage, and of the time before it.
        windows: before, its two halves, during.
        p99_ratio: of the steps during the outage to before.
        noise_ratio: of the second half before the outage to the first: what no fault at all does here.
        waits: steps that waited for the service.
        max_staleness: the bound.
        age_max: of any preconditioner that was used.
        seconds_to_fresh: from the return of the service to a new version of every block.
    """

    model_config = ConfigDict(extra="forbid")

    workload: str
    how: How
    seconds: float
    torch: str
    threads: int
    windows: list[Window]
    p99_ratio: float
    noise_ratio: float
    waits: int
    max_staleness: int
    age_max: int
    seconds_to_fresh: float


class _Training:
    def __init__(self, workload: Workload, service: LocalService, max_staleness: int) -> None:
        self._workload = workload
        self._model = workload.build_model(0)
        self._step = 0
        self.optimizer = Shampoo(
            self._model.named_parameters(),
            lr=3e-3,
            staleness=StalenessConfig(max_staleness=max_staleness),
            service=ServiceConfig(address=service.address, token=service.token),
        )

    def until(self, condition: Callable[[], bool], longest: float = _LONGEST_SECONDS) -> list[float]:
        """Train until the condition holds; the durations of the steps."""
        seconds: list[float] = []
        end = time.monotonic() + longest
        while not condition():
            if time.monotonic() > end:
                raise OutageError(f"no preconditioners within {longest:g} s")
            batch = self._workload.batch(0, self._step)
            self._step += 1
            began = time.perf_counter()
            self.optimizer.zero_grad()
            loss = self._workload.criterion(self._model(batch.inputs), batch.targets)
            torch.autograd.backward(loss)
            self.optimizer.step()
            seconds.append(time.perf_counter() - began)
        return seconds

    def for_seconds(self, seconds: float) -> list[float]:
        """Train for so long."""
        end = time.monotonic() + seconds
        return self.until(lambda: time.monotonic() >= end, seconds + _LONGEST_SECONDS)

    def until_fresh(self) -> list[float]:
        """Train until every block has a version whose snapshot is younger than this call."""
        step = self._step

        def fresh() -> bool:
            metrics = self.optimizer.metrics()
            age = metrics["age"]
            whole = metrics["blocks_with_version"] == metrics["blocks"] > 0
            return bool(whole and self._step - age > step)

        return self.until(fresh)


def benchmark(workload: Workload, *, seconds: float, how: How, max_staleness: int) -> OutageBenchmark:
    """Train before, during and after an outage of a service that is started for it.

    Args:
        workload: what to train.
        seconds: of the outage, and of the time before it.
        how: the service is lost.
        max_staleness: the bound, which the outage must not exceed.

    Raises:
        OutageError: the bound was exceeded, or nothing ever arrived.
        ServiceError: the service did not start.
    """
    with LocalService() as service:
        training = _Training(workload, service, max_staleness)
        try:
            training.until_fresh()
            first, second = training.for_seconds(seconds / 2), training.for_seconds(seconds / 2)
            service.kill() if how == "kill" else service.freeze()
            during = training.for_seconds(seconds)
            metrics = training.optimizer.metrics()
            if metrics["age"] > max_staleness:
                raise OutageError(
                    f"preconditioners became {metrics['age']} steps old, and beyond the bound of "
                    f"{max_staleness} steps wait by intention: raise --max-staleness"
                )
            # Not part of any window: it takes as long as Ray takes to start.
            service.start() if how == "kill" else service.thaw()
            back = time.monotonic()
            training.until_fresh()
            to_fresh = time.monotonic() - back
            age_max = training.optimizer.metrics()["age_max"]
        finally:
            training.optimizer.close()
    windows = [
        Window.of(name, part)
        for name, part in (
            ("before", first + second),
            ("before, first half", first),
            ("before, second half", second),
            ("during the outage", during),
        )
    ]
    before, early, late, lost = (window.p99_ms for window in windows)
    return OutageBenchmark(
        workload=workload.name,
        how=how,
        seconds=seconds,
        torch=str(torch.__version__),
        threads=torch.get_num_threads(),
        windows=windows,
        p99_ratio=round(lost / before, 4),
        noise_ratio=round(late / early, 4),
        waits=metrics["waits"],
        max_staleness=max_staleness,
        age_max=age_max,
        seconds_to_fresh=round(to_fresh, 2),
    )


def shortcomings(result: OutageBenchmark, bound: float) -> list[str]:
    """Why the outage did cost the steps something; empty if it did not.

    Args:
        result: of :func:`benchmark`.
        bound: of the 99th percentile during the outage, as a multiple of that before.
    """
    found = []
    if not result.p99_ratio <= bound:
        found.append(f"the steps' p99 during / before is {result.p99_ratio:g}, the bound is {bound:g}")
    if result.waits:
        found.append(f"{result.waits} steps waited")
    return found


def table(result: OutageBenchmark) -> Table:
    """For people."""
    shown = Table(
        title=f"Whole steps, {result.seconds:g} s without the service ({result.how}), milliseconds",
        caption=(
            f"p99 during / before: {result.p99_ratio:.3f}; second half before / first: "
            f"{result.noise_ratio:.3f}. Steps that waited: {result.waits}. Oldest preconditioner used: "
            f"{result.age_max} steps (bound {result.max_staleness}). Every block fresh "
            f"{result.seconds_to_fresh:.1f} s after the return."
        ),
    )
    for column in ("", "steps", "median", "p99", "slowest"):
        shown.add_column(column, justify="left" if not column else "right")
    for window in result.windows:
        shown.add_row(
            window.name,
            str(window.steps),
            f"{window.median_ms:.2f}",
            f"{window.p99_ms:.2f}",
            f"{window.slowest_ms:.2f}",
        )
    return shown


def save(result: OutageBenchmark, path: Path) -> None:
    """Write the result as JSON."""
    write_text(path, result.model_dump_json(indent=1) + "\n")
