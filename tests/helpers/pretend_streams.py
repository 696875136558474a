"""Streams, events and memory of an accelerator that is not there, see :mod:`pretend_cuda`.

Work is done when it is launched, but for copies to the host, which are done when the host learns that they
are. What real streams would leave to chance is worked out instead, with a vector clock for each stream and
for the host: who may not know yet that a piece of work is done must not build on it.
"""

from __future__ import annotations

import functools
import itertools
import threading

import torch


def alone(method):
    """One thread at a time: a trainer's and those of its exchange use the accelerator together."""

    @functools.wraps(method)
    def run(self, *args, **kwargs):
        with getattr(self, "runtime", self).lock:
            return method(self, *args, **kwargs)

    return run


class Runtime:
    """What all tensors, streams and events of a pretended accelerator have in common.

    Args:
        lag: how many queries of an event are answered with no, unless the host knows better.

    Attributes:
        contexts: devices on which somebody would have made a context.
        faults: what was wrong where no error can be raised, as when memory is freed.
        pinned: storages in page-locked memory, by address; they stay, so that no address comes back.
    """

    def __init__(self, lag):
        self.lag = lag
        # What is freed meanwhile, and what a copy does when it ends, come back here.
        self.lock = threading.RLock()
        self.host = {}
        self.contexts = set()
        self.faults = []
        self.pinned = {}
        self.may_wait = True
        self.streams = []
        self._default = {}
        self._of_thread = threading.local()
        self._pending = []

    @property
    def device(self):
        """Number of the thread's current device."""
        return getattr(self._of_thread, "device", 0)

    @device.setter
    def device(self, index):
        self._of_thread.device = index

    def index_of(self, device):
        """Of a device, a number or None, which is the current one."""
        index = device if device is None or isinstance(device, int) else torch.device(device).index
        return self.device if index is None else index

    @alone
    def current(self, device=None):
        """The thread's stream for new work on a device."""
        index = self.index_of(device)
        if index not in self._default:
            self._default[index] = Stream(self, index)
        return self._selected().get(index, self._default[index])

    def select(self, stream):
        """Make a stream, and its device, the thread's current ones; returns what they were."""
        before = self.device, self._selected().get(stream.device.index)
        self.device = stream.device.index
        self._selected()[stream.device.index] = stream
        return before

    def restore(self, stream, before):
        """Undo :meth:`select`."""
        self.device, of_device = before
        if of_device is None:
            del self._selected()[stream.device.index]
        else:
            self._selected()[stream.device.index] = of_device

    def touch(self):
        """A call that works in the context of the thread's current device, and makes one if there is none."""
        self.contexts.add(self.device)

    def wait(self, what, clock):
        """The host waits for all that a clock knows."""
        if not self.may_wait:
            raise RuntimeError(f"the host waits for the accelerator: {what}")
        self.observe(clock)

    @alone
    def observe(self, clock):
        """The host learns that this is done."""
        merge(self.host, clock)
        due = [self.host.get(stream, 0) >= tick for stream, tick, _ in self._pending]
        finished = list(itertools.compress(self._pending, due))
        self._pending = [entry for entry, is_due in zip(self._pending, due, strict=True) if not is_due]
        for _, _, finish in finished:
            finish()

    @alone
    def later(self, stream, tick, finish):
        """Call ``finish`` once the host knows of this piece of work that it is done."""
        self._pending.append((stream, tick, finish))

    @alone
    def knows(self, clock, stream, tick):
        return max(clock.get(stream, 0), self.host.get(stream, 0)) >= tick

    def _selected(self):
        if not hasattr(self._of_thread, "streams"):
            self._of_thread.streams = {}
        return self._of_thread.streams


class Stream:
    """As ``torch.cuda.Stream``."""

    def __init__(self, runtime, device=None):
        self.runtime = runtime
        self.device = torch.device("cuda", runtime.index_of(device))
        self.number = len(runtime.streams)
        self.clock = {}
        runtime.streams.append(self)
        runtime.contexts.add(self.device.index)

    def __repr__(self):
        return f"<stream {self.number} of {self.device}>"

    @alone
    def launch(self, what, reads=(), writes=()):
        """A kernel that reads and writes such memory; returns its tick."""
        # Whatever the host knows to be done when it launches is done.
        merge(self.clock, self.runtime.host)
        for memory in (*reads, *writes):
            self._require(memory, memory.written, f"{what} on {self} may come before what it reads")
        for memory in writes:
            for stream, tick in memory.reads.items():
                self._require(memory, (stream, tick), f"{what} on {self} may overwrite what is still read")
        tick = self.clock[self] = self.clock.get(self, 0) + 1
        for memory in reads:
            memory.reads[self] = tick
        for memory in writes:
            memory.written = self, tick
        return tick

    def _require(self, memory, access, complaint):
        if access is not None and not self.runtime.knows(self.clock, *access):
            raise RuntimeError(f"{complaint}: a race with {access[0]}")

    @alone
    def wait_stream(self, stream):
        merge(self.clock, stream.clock)

    @alone
    def wait_event(self, event):
        merge(self.clock, event.clock or {})

    def record_event(self, event=None):
        event = event or Event(runtime=self.runtime)
        event.record(self)
        return event

    def synchronize(self):
        self.runtime.wait("Stream.synchronize", self.clock)


class Event:
    """As ``torch.cuda.Event``."""

    def __init__(self, enable_timing=False, blocking=False, interprocess=False, *, runtime):
        self.runtime = runtime
        self.device = None
        self.clock = None
        self._asked = 0

    @alone
    def record(self, stream=None):
        stream = stream or self.runtime.current()
        self.device, self.clock, self._asked = stream.device, dict(stream.clock), 0

    def wait(self, stream=None):
        (stream or self.runtime.current()).wait_event(self)

    @alone
    def query(self):
        self.runtime.touch()
        if self.clock is None or all(self.runtime.host.get(s, 0) >= tick for s, tick in self.clock.items()):
            return True
        self._asked += 1
        if self._asked <= self.runtime.lag:
            return False
        self.runtime.observe(self.clock)
        return True

    def synchronize(self):
        self.runtime.touch()
        if self.clock is not None:
            self.runtime.wait("Event.synchronize", self.clock)


class Memory:
    """What views of one tensor share, from its allocation until the last of them is gone."""

    def __init__(self, stream):
        self.stream = stream
        self.written = None
        self.reads = {}
        self.recorded = set()

    def __del__(self):
        # The allocator gives it to what is launched next on its own stream, and knows of no other.
        accesses = [*self.reads.items(), *([self.written] if self.written else [])]
        for stream, tick in accesses:
            own = self.stream
            if stream in (own, *self.recorded) or own.runtime.knows(own.clock, stream, tick):
                continue
            own.runtime.faults.append(f"memory of {own} was freed while {stream} may still use it")


def merge(clock, other):
    """Know what the other knows, too."""
    for stream, tick in other.items():
        clock[stream] = max(tick, clock.get(stream, 0))
