"""One arm through a real service: gRPC, Ray, its own processes, the same schedule of ages.

The service runs beside this process; the client holds each preconditioner back until its step
(``adoption="scheduled"``), so the run can be laid beside the virtual one, step by step.
"""

from __future__ import annotations

import math
import time

import numpy as np

from preconditioner_client import ServiceConfig, SessionSpec
from preconditioner_client.service_exchange import ServiceExchange
from preconditioner_worker.results import ResultError
from preconditioner_worker.staleness.execution import Job
from preconditioner_worker.staleness.results import StudyRun
from preconditioner_worker.staleness.specs import Record, StudySettings
from preconditioner_worker.staleness.training import train

REAL_FILE = "real.json"
START_SECONDS = 300.0


class RealComparison(Record):
    """A run through the service and the virtual run of the same condition.

    Attributes:
        real: through the service.
        virtual: roots in process.
        first_difference: first step whose losses differ in any bit; None if all are equal.
        largest_difference: of the batches' losses, absolute.
    """

    real: StudyRun
    virtual: StudyRun
    first_difference: int | None
    largest_difference: float

    @property
    def ages_match(self) -> bool:
        """Whether both logged the arm's ages, at every step."""
        return bool(
            self.real.ages_as_planned and self.virtual.ages_as_planned and self.real.ages == self.virtual.ages
        )

    def describe(self) -> str:
        """In words."""
        spec = self.real.spec
        equal = (
            f"all {self.real.steps} losses are equal bit for bit"
            if self.first_difference is None
            else f"losses first differ at step {self.first_difference}, at most by "
            f"{self.largest_difference:.1e}, and the final held-out loss by "
            f"{abs(self.real.final_loss - self.virtual.final_loss):.1e} ({self.real.final_loss:.4f} and "
            f"{self.virtual.final_loss:.4f})"
        )
        ages = "are those of the arm at every step" if self.ages_match else "DIFFER from those of the arm"
        return (
            f"{spec.condition}, seed {spec.seed}, {self.real.steps} steps, once with roots from an embedded "
            f"service (gRPC and Ray) and once in process: the logged ages {ages} "
            f"({min(self.real.ages, default='none')} to {max(self.real.ages, default='none')}), "
            f"{self.real.versions_adopted} versions were adopted, {self.real.waits} steps waited; {equal}."
        )


class AwaitedExchange(ServiceExchange):
    """Stands still in the first step until the service is up: how long that takes is not what is studied."""

    def open(self, session: SessionSpec) -> None:
        """Begin, and wait for the connection.

        Raises:
            TimeoutError: it was not there in time.
        """
        super().open(session)
        deadline = time.monotonic() + START_SECONDS
        while not self.counters()["connected"]:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the preconditioner service was not up within {START_SECONDS:.0f} s")
            time.sleep(0.05)


def compare(
    job: Job, settings: StudySettings, *, service: ServiceConfig | str = "embedded"
) -> RealComparison:
    """Make the run twice, through a service and in process.

    Args:
        job: an arm with a delay, and its learning rate.
        settings: of the study; choose fewer steps.
        service: where the roots come from.

    Raises:
        ResultError: the arm has no delay, or is longer than the run.
        TimeoutError: the service was not up in time.
    """
    arm = job.spec.arm
    if arm is None or arm.delay == 0:
        raise ResultError(f"{job.spec.condition} has no delay: a service needs an arm A(N) or L(D)")
    if settings.steps <= arm.interval + arm.delay:
        raise ResultError(
            f"{settings.steps} steps are too few for {job.spec.condition}: its first preconditioner is used "
            f"from step {arm.interval + arm.delay} on"
        )
    real_losses: list[float] = []
    virtual_losses: list[float] = []
    exchange = AwaitedExchange(ServiceConfig.resolve(service))
    real = train(job.spec, settings, job.lr, service=exchange, losses=real_losses)
    virtual = train(job.spec, settings, job.lr, losses=virtual_losses)
    return RealComparison(
        real=real,
        virtual=virtual,
        first_difference=first_difference(real_losses, virtual_losses),
        largest_difference=largest_difference(real_losses, virtual_losses),
    )


def first_difference(a: list[float], b: list[float]) -> int | None:
    """Number of the first step, from 1, at which two series differ; None if they are the same."""
    for step, (x, y) in enumerate(zip(a, b, strict=False), start=1):
        if x != y:
            return step
    return None if len(a) == len(b) else min(len(a), len(b)) + 1


def largest_difference(a: list[float], b: list[float]) -> float:
    """Of two series, absolute; NaN if a run diverged."""
    if len(a) != len(b):
        return math.nan
    return float(np.abs(np.subtract(a, b)).max())
