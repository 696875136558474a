"""Many pieces of work over many cores: a process each, one thread each, and a display of how far they are."""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from typing import Generic, NamedTuple, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from preconditioner_worker.results import ResultError

POLL_SECONDS = 0.5
LINE_EVERY_SECONDS = 60.0

Result = TypeVar("Result")


@dataclass(frozen=True)
class Work(Generic[Result]):
    """What one process does.

    Attributes:
        key: what the display calls it; works that differ in little may share one.
        size: how much it is, in the unit of the display.
        call: does it; can be pickled, and takes ``report=``, a function to be told how much is done.
    """

    key: str
    size: int
    call: Callable[..., Result]


class _Report(NamedTuple):
    """What a process tells of its work."""

    key: str
    made: int


def execute(
    works: Sequence[Work[Result]],
    *,
    unit: str,
    processes: int,
    console: Console,
    done: Callable[[Result], str],
) -> None:
    """Do all of it.

    Args:
        works: in the order in which they are begun.
        unit: of their sizes, as in ``steps``.
        processes: works at a time.
        console: where progress is shown.
        done: called in this process after each, in the order in which they end; returns how it ended.

    Raises:
        ResultError: a process was killed. What ``done`` was called with is done.
    """
    if not works:
        return
    # Spawned, since torch's threads do not survive a fork.
    context = get_context("spawn")
    reports: Queue[_Report] = context.Queue()
    stop = context.Event()
    with (
        _interrupts() as interrupted,
        _Display(works, unit, console) as display,
        ProcessPoolExecutor(
            processes, mp_context=context, initializer=_begin, initargs=(reports, stop)
        ) as pool,
    ):
        works_of: dict[Future[Result], Work[Result]] = {pool.submit(_run, work): work for work in works}
        pending = set(works_of)
        try:
            while pending:
                if interrupted.is_set():
                    raise KeyboardInterrupt
                ended, pending = wait(pending, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
                while (report := _next(reports)) is not None:
                    display.made(report)
                for future in ended:
                    display.ended(works_of[future], done(future.result()))
        except BrokenProcessPool as error:
            raise ResultError(
                "a process of the study was killed (by the kernel for want of memory, perhaps); finished "
                "runs are kept: start the same command again, with fewer at a time if memory was short"
            ) from error
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Set an event at Ctrl-C: an exception in the midst of the pool's own locks could leave them held."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    before = signal.signal(signal.SIGINT, lambda number, frame: interrupted.set())
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


_reports: Queue[_Report] | None = None
_stop: Event | None = None


def _begin(reports: Queue[_Report], stop: Event) -> None:
    global _reports, _stop
    _reports, _stop = reports, stop
    # A report that nobody reads any more holds up no end.
    reports.cancel_join_thread()
    # An interrupt at the keyboard reaches all processes; the parent tells the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A pool's processes outlive a parent that was killed; these do not."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _run(work: Work[Result]) -> Result:
    def report(made: int) -> None:
        if _stop is not None and _stop.is_set():
            raise InterruptedError("the study was interrupted")
        if _reports is not None:
            _reports.put(_Report(work.key, made))

    return work.call(report=report)


def _next(reports: Queue[_Report]) -> _Report | None:
    try:
        return reports.get_nowait()
    except queue.Empty:
        return None


class _Display:
    """Bars on a terminal, one for all and one for each work under way; elsewhere a line now and then."""

    def __init__(self, works: Sequence[Work[Result]], unit: str, console: Console) -> None:
        self._unit, self._console = unit, console
        self._sizes = {work.key: work.size for work in works}
        self._works, self._total = len(works), sum(work.size for work in works)
        self._ended, self._done = 0, 0
        self._at: dict[str, int] = {}
        self._bars: dict[str, TaskID] = {}
        self._next_line = time.monotonic() + LINE_EVERY_SECONDS
        self._progress = Progress(
            TextColumn("{task.description:<32}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._all = self._progress.add_task(f"{unit} of all runs", total=self._total)
        shown: AbstractContextManager[object] = self._progress if console.is_terminal else nullcontext()
        self._shown = shown

    def __enter__(self) -> _Display:
        self._shown.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def made(self, report: _Report) -> None:
        key, made = report
        if made >= self._sizes[key]:  # its end is told by :meth:`ended`
            return
        self._at[key] = made
        if key not in self._bars:
            self._bars[key] = self._progress.add_task(key, total=self._sizes[key])
        self._progress.update(self._bars[key], completed=made)
        self._update()

    def ended(self, work: Work[Result], end: str) -> None:
        self._ended += 1
        self._done += work.size
        self._at.pop(work.key, None)
        if work.key in self._bars:
            self._progress.remove_task(self._bars.pop(work.key))
        text = f"{self._ended}/{self._works} {work.key}: {end}"
        self._console.print(text, highlight=False, soft_wrap=True)
        self._update()

    def _update(self) -> None:
        completed = self._done + sum(self._at.values())
        self._progress.update(self._all, completed=completed)
        if not self._console.is_terminal and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + LINE_EVERY_SECONDS
            running = ", ".join(f"{key} at {made}" for key, made in sorted(self._at.items()))
            share = completed / self._total
            self._console.print(
                f"{share:.0%} of all {self._unit}; {running}", highlight=False, soft_wrap=True
            )
