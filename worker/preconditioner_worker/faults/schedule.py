"""Which fault when: drawn before the first is injected, so that a seed names a run."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from preconditioner_worker.faults.catalogue import CATALOGUE, Fault


@dataclass(frozen=True, slots=True)
class Planned:
    """One fault of a schedule.

    Attributes:
        name: in the catalogue.
        job: whom it meets; a fault of the service meets all.
        pause: seconds before it.
        hold: seconds that it lasts.
        draw: see :class:`preconditioner_worker.faults.catalogue.Stage`.
    """

    name: str
    job: str
    pause: float
    hold: float
    draw: float


def schedule(seed: int, jobs: Sequence[str], catalogue: Mapping[str, Fault] = CATALOGUE) -> Iterator[Planned]:
    """Faults without end; the same for the same seed and jobs.

    The first ones are one of each kind in random order, so that short runs see as many as they have time for.
    """
    source = random.Random(seed)
    names = list(catalogue)
    first = source.sample(names, len(names))
    while True:
        name = first.pop() if first else source.choices(names, [catalogue[n].weight for n in names])[0]
        yield Planned(
            name,
            source.choice(list(jobs)),
            source.uniform(0.2, 1.5),
            source.uniform(*catalogue[name].hold),
            source.random(),
        )
