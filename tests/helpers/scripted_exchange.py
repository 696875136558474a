"""An exchange that a test holds in its hand: it keeps snapshots, and delivers what the test puts in."""

from __future__ import annotations

import torch

from preconditioner_client import Arrival, Rejection


class ScriptedExchange:
    """Delivers nothing by itself. ``on_wait`` is called in place of waiting and says if anything happened."""

    def __init__(self, on_wait=None):
        self.generation = 0
        self.session = None
        self.sessions = []
        self.offered = []
        self.inbox = []
        self.waits = []
        self.on_wait = on_wait or (lambda exchange, timeout: False)

    def open(self, session):
        self.session = session
        self.sessions.append(session)
        self.generation += 1

    def offer(self, snapshots, step):
        self.offered.extend(snapshots)

    def collect(self, step):
        inbox, self.inbox = self.inbox, []
        return inbox

    def wait(self, timeout):
        self.waits.append(timeout)
        return self.on_wait(self, timeout)

    def counters(self):
        return {"connected": 1}

    def close(self):
        pass

    def answer(self, block, step, scale=1.0):
        """Deliver multiples of the identity."""
        sides = tuple(scale * torch.eye(n) for n in self.session.blocks[block].sides)
        self.inbox.append(Arrival(block, step, sides))

    def refuse(self, block, step, reason="ROOT_FAILED"):
        self.inbox.append(Rejection(block, step, reason, "no root"))

    def steps_offered(self, block=0):
        return [s.step for s in self.offered if s.block == block]
