"""A history as it should be, in memory, for tests to spoil."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from preconditioner_client import Ridge
from preconditioner_client.roots import inverse_root
from preconditioner_protos import pack, unpack
from preconditioner_protos.history import Event, Kind, Scope, digest_of, load_matrix

BLOCKS = 2
SIDE = 5
BOUND = 30
REFRESH = 10
LIFE = Scope("job", 0, 1000)


class Story:
    """Events of trainers and services, numbered and timed as they are told."""

    def __init__(self, matrices) -> None:
        self.events = []
        self._matrices = matrices
        self._time = 100.0
        self._random = np.random.default_rng(0)

    def tell(self, source, kind, scope=None, **fields):
        """One event; a millisecond after the one before."""
        self._time += 0.001
        own = {name: fields.pop(name) for name in ("block", "version", "step") if name in fields}
        job, rank, epoch = scope or (None, None, None)
        self.events.append(
            Event(kind=kind, at=self._time, wall=self._time, source=source, number=0,
                  job=job, rank=rank, epoch=epoch, **own, data=fields)
        )  # fmt: skip

    def save(self, matrix):
        """Its digest."""
        packed = pack(np.asarray(matrix)).astype("<f4")
        np.save(self._matrices / f"{digest_of(packed)}.npy", packed)
        return digest_of(packed)

    def root_of(self, block, version, ridge):
        """The root that a snapshot has with this ridge."""
        sent = self.events[self.find(Kind.SNAPSHOT_SENT, block=block, version=version)]
        statistics = unpack(load_matrix(self._matrices, sent.data["digests"][0]), SIDE)
        return inverse_root(torch.from_numpy(statistics), 4.0, ridge)

    def write(self, folder):
        """One file for each source, numbered without a hole; returns the paths."""
        lines = {}
        for event in self.events:
            of_source = lines.setdefault(event.source, [])
            of_source.append(dataclasses.replace(event, number=len(of_source)).line())
        paths = []
        for source, own in lines.items():
            paths.append(folder / f"{source}.jsonl")
            paths[-1].write_bytes(b"".join(own))
        return paths

    def session(self, trainer, service, scope=LIFE, step=0, versions=(-1,) * BLOCKS, **settings):
        """A trainer's session begins, and is opened and attached."""
        self.tell(
            trainer, Kind.TRAINER_SESSION, scope, step=step, versions=list(versions),
            blocks=[{"name": f"w{b}", "sides": [SIDE], "root_orders": [4.0], "ridge": ["relative", 1e-6]}
                    for b in range(BLOCKS)],
            **{"max_staleness": BOUND, "policy": "wait", "adoption": "eager", "delay": None,
               "stale_timeout": 1.0, "snapshots_in_flight": 1, **settings},
        )  # fmt: skip
        self.tell(service, Kind.SESSION_OPENED, scope, blocks=BLOCKS, budget=10_000)
        self.tell(service, Kind.STREAM_ATTACHED, scope)
        self.tell(trainer, Kind.TRAINER_ATTACHED, scope)

    def trip(self, trainer, service, block, version, scope=LIFE):
        """A snapshot goes up and its root comes down; returns the root's digests."""
        about = {"block": block, "version": version}
        factor = self._random.standard_normal((SIDE, 2 * SIDE))
        statistics = (factor @ factor.T).astype(np.float32)
        snapshot = [self.save(statistics)]
        root = [self.save(inverse_root(torch.from_numpy(statistics), 4.0, Ridge()))]
        self.tell(trainer, Kind.SNAPSHOT_TAKEN, scope, **about)
        self.tell(trainer, Kind.SNAPSHOT_SENT, scope, **about, digests=snapshot)
        self.tell(service, Kind.SNAPSHOT_ACCEPTED, scope, **about, digests=snapshot)
        self.tell(trainer, Kind.SNAPSHOT_ACKNOWLEDGED, scope, **about)
        self.tell(service, Kind.PUBLISHED, scope, **about, digests=root, retries=[0])
        self.tell(service, Kind.PUSHED, scope, **about)
        self.tell(trainer, Kind.RECEIVED, scope, **about, digests=root)
        self.tell(service, Kind.RECEIPTED, scope, **about)
        return root

    def held(self, trainer, service, scope=LIFE):
        """Both ends look at what they hold."""
        budgets = {"waiting_budget": 100, "unanswered_budget": 100, "inbox_budget": 100}
        self.tell(trainer, Kind.TRAINER_HELD, scope, waiting=1, unanswered=1, inbox=1, **budgets)
        self.tell(service, Kind.SERVICE_HELD, held=5, budget=10, sessions=[["job", 0, 5, 10]], rss=1000)

    def steps(self, trainer, service, first, last, scope=LIFE, delay=None):
        """Training with a refresh every ten steps, adopted in the next step or after ``delay``."""
        under_way = []
        used = None
        known = set()
        for step in range(first, last + 1):
            self.tell(trainer, Kind.STEP_BEGUN, scope, step=step)
            for due in [u for u in under_way if step >= u[0] + (delay or 1)]:
                under_way.remove(due)
                version, block, root = due
                self.tell(trainer, Kind.ADOPTED, scope, block=block, version=version, step=step, digests=root)
                known.add(block)
            if step % REFRESH == 0:
                under_way += [(step, b, self.trip(trainer, service, b, step, scope)) for b in range(BLOCKS)]
                self.held(trainer, service, scope)
            now = sorted(known)
            self.tell(trainer, Kind.STEP_ENDED, scope, step=step, seconds=0.01, waited=0.0,
                      used=None if now == used else now)  # fmt: skip
            used = now

    def find(self, kind, position=0, **fields):
        """Index of an event of a kind; ``position`` counts those that have these fields."""
        found = [
            index
            for index, event in enumerate(self.events)
            if event.kind is kind and all(getattr(event, name) == value for name, value in fields.items())
        ]
        return found[position]

    def change(self, index, data=None, **fields):
        """Replace fields, or entries of the data, of an event."""
        event = self.events[index]
        self.events[index] = dataclasses.replace(event, data={**event.data, **(data or {})}, **fields)

    def insert(self, index, kind, source, scope=LIFE, **fields):
        """Tell an event just before the one at ``index``."""
        before = self.events[index]
        self.tell(source, kind, scope, **fields)
        late = self.events.pop()
        self.events.insert(index, dataclasses.replace(late, at=before.at - 0.0005))


def good_story(matrices, **settings):
    """One job of 60 steps with one service, drained and closed in order."""
    story = Story(matrices)
    story.tell("service", Kind.RECORDER_OPENED, role="service", pid=1)
    story.tell("trainer", Kind.RECORDER_OPENED, role="trainer", pid=2)
    story.session("trainer", "service", **settings)
    story.steps("trainer", "service", 1, 60, delay=settings.get("delay"))
    story.tell("service", Kind.DRAIN_BEGUN, grace=1.0)
    story.tell("service", Kind.DRAIN_ENDED, complete=True)
    story.tell("service", Kind.SESSION_CLOSED, LIFE, why="the end", fenced=False)
    story.tell("trainer", Kind.RECORDER_CLOSED)
    story.tell("service", Kind.RECORDER_CLOSED)
    return story
