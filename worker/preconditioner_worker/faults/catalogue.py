"""What a soak does to its cast: each fault, how it is injected and how it is healed."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from preconditioner_worker.faults.cast import Job, actors
from preconditioner_worker.faults.proxy import Proxy, Shape, Way
from preconditioner_worker.faults.service import LocalService, ServiceError

_STARTS = 3


@dataclass(frozen=True, slots=True)
class Stage:
    """What a fault acts on.

    Attributes:
        service: that all jobs share.
        job: the one that was drawn.
        draw: a number in [0, 1), of the schedule's own randomness.
    """

    service: LocalService
    job: Job
    draw: float


@dataclass(frozen=True, slots=True)
class Fault:
    """One kind of fault.

    Attributes:
        inject: begins it.
        heal: ends it.
        weight: how often it is drawn, relative to the others.
        hold: seconds that it lasts, least and most.
        about: what it acts on: ``job``, ``link`` or ``service``.
        stops: no process of the drawn job makes steps while it lasts.
    """

    inject: Callable[[Stage], None]
    heal: Callable[[Stage], None]
    weight: float
    hold: tuple[float, float]
    about: str
    stops: bool = False


def _nothing(stage: Stage) -> None:
    """It heals by itself."""


def _link(action: Callable[[Proxy], None]) -> Callable[[Stage], None]:
    return lambda stage: action(stage.job.link)


def _shaped(shape: Shape) -> Callable[[Stage], None]:
    return _link(lambda link: link.shape(shape))


_heal_link = _link(lambda link: link.heal())


def _start_again(stage: Stage) -> None:
    """More than once, if it must be: on a machine at its limit Ray gives up a start after a while."""
    for _ in range(_STARTS - 1):
        with contextlib.suppress(ServiceError):
            stage.service.start()
            return
    stage.service.start()


def _kill_actor(stage: Stage) -> None:
    found = actors(stage.service)
    if found:
        found[int(stage.draw * len(found))].kill()


def _replace(stage: Stage) -> None:
    """The old trainer is frozen, and one that resumed takes its place; later the old one wakes up."""
    stage.job.signal(signal.SIGSTOP)
    stage.job.leave_behind()
    stage.job.start()


def _wake(stage: Stage) -> None:
    stage.job.wake_zombies()


CATALOGUE: Mapping[str, Fault] = {
    "service killed": Fault(lambda stage: stage.service.kill(), _start_again, 1, (0.0, 2.0), "service"),
    "service frozen": Fault(
        lambda stage: stage.service.freeze(), lambda stage: stage.service.thaw(), 2, (0.3, 3.0), "service"
    ),
    "actor killed": Fault(_kill_actor, _nothing, 3, (0.3, 2.0), "service"),
    "trainer killed": Fault(
        lambda stage: stage.job.kill(), lambda stage: stage.job.start(), 1, (0.0, 1.0), "job", stops=True
    ),
    "trainer frozen": Fault(
        lambda stage: stage.job.signal(signal.SIGSTOP),
        lambda stage: stage.job.signal(signal.SIGCONT),
        2,
        (0.3, 3.0),
        "job",
        stops=True,
    ),
    "zombie trainer": Fault(_replace, _wake, 1, (3.0, 5.0), "job", stops=True),
    "statistics spoilt": Fault(
        lambda stage: stage.job.signal(signal.SIGUSR1),
        lambda stage: stage.job.signal(signal.SIGUSR2),
        2,
        (0.5, 3.0),
        "job",
    ),
    "connection cut": Fault(_link(lambda link: link.drop()), _nothing, 4, (0.1, 1.0), "link"),
    "connection half open": Fault(_link(lambda link: link.vanish(Way.UP)), _nothing, 1, (0.1, 1.0), "link"),
    "partition": Fault(_link(lambda link: link.stall()), _heal_link, 3, (0.5, 5.0), "link"),
    "slow reader": Fault(_link(lambda link: link.stall(Way.DOWN)), _heal_link, 2, (0.5, 4.0), "link"),
    "latency and loss": Fault(_shaped(Shape(delay=0.1, loss=0.05)), _heal_link, 2, (1.0, 4.0), "link"),
    "1 Mbit/s": Fault(_shaped(Shape(rate=1e6)), _heal_link, 2, (1.0, 4.0), "link"),
}
"""By name."""
