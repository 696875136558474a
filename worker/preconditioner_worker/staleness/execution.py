"""Many runs over many cores: a process each, one thread each, and a display of how far they are."""

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
from multiprocessing import connection, get_context, parent_process
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from preconditioner_worker.results import ResultError
from preconditioner_worker.staleness.results import StudyRun
from preconditioner_worker.staleness.specs import RunSpec, StudySettings
from preconditioner_worker.staleness.training import train

POLL_SECONDS = 0.5
LINE_EVERY_SECONDS = 60.0


class Job(NamedTuple):
    """One run that is to be made."""

    spec: RunSpec
    lr: float


class _Report(NamedTuple):
    """What a process tells of its run."""

    key: str
    step: int


def execute(
    jobs: Sequence[Job],
    settings: StudySettings,
    *,
    processes: int,
    console: Console,
    done: Callable[[StudyRun], None],
) -> None:
    """Make all runs.

    Args:
        jobs: in the order in which they are begun.
        settings: of the study.
        processes: runs at a time.
        console: where progress is shown.
        done: called in this process after each run, in the order in which they end.

    Raises:
        ResultError: a process was killed. What ``done`` was called with is done.
    """
    if not jobs:
        return
    # Spawned, since torch's threads do not survive a fork.
    context = get_context("spawn")
    reports: Queue[_Report] = context.Queue()
    stop = context.Event()
    with (
        _interrupts() as interrupted,
        _Display(len(jobs), settings.steps, console) as display,
        ProcessPoolExecutor(
            processes, mp_context=context, initializer=_begin, initargs=(reports, stop)
        ) as pool,
    ):
        pending: set[Future[StudyRun]] = {pool.submit(_run, job, settings) for job in jobs}
        try:
            while pending:
                if interrupted.is_set():
                    raise KeyboardInterrupt
                ended, pending = wait(pending, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
                while (report := _next(reports)) is not None:
                    display.step(report)
                for future in ended:
                    run = future.result()
                    done(run)
                    display.ended(run)
        except BrokenProcessPool as error:
            raise ResultError(
                "a process of the study was killed (by the kernel for want of memory, perhaps); finished "
                "runs are kept: start the same command again, with fewer --jobs if memory was short"
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


def _run(job: Job, settings: StudySettings) -> StudyRun:
    def report(step: int) -> None:
        if _stop is not None and _stop.is_set():
            raise InterruptedError("the study was interrupted")
        if _reports is not None:
            _reports.put(_Report(job.spec.key, step))

    return train(job.spec, settings, job.lr, report=report)


def _next(reports: Queue[_Report]) -> _Report | None:
    try:
        return reports.get_nowait()
    except queue.Empty:
        return None


class _Display:
    """Bars on a terminal, one for all and one for each run under way; elsewhere a line now and then."""

    def __init__(self, runs: int, steps: int, console: Console) -> None:
        self._runs, self._steps, self._console = runs, steps, console
        self._done = 0
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
        self._all = self._progress.add_task("steps of all runs", total=runs * steps)
        shown: AbstractContextManager[object] = self._progress if console.is_terminal else nullcontext()
        self._shown = shown

    def __enter__(self) -> _Display:
        self._shown.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def step(self, report: _Report) -> None:
        if report.step >= self._steps:  # its end is told by :meth:`ended`
            return
        self._at[report.key] = report.step
        if report.key not in self._bars:
            self._bars[report.key] = self._progress.add_task(report.key, total=self._steps)
        self._progress.update(self._bars[report.key], completed=report.step)
        self._update()

    def ended(self, run: StudyRun) -> None:
        self._done += 1
        self._at.pop(run.spec.key, None)
        if run.spec.key in self._bars:
            self._progress.remove_task(self._bars.pop(run.spec.key))
        end = "diverged" if run.diverged else f"{run.metric}: {run.final_loss:.4f}"
        text = f"{self._done}/{self._runs} {run.spec.key}: {end}, {run.seconds:.0f} s"
        self._console.print(text, highlight=False, soft_wrap=True)
        self._update()

    def _update(self) -> None:
        completed = self._done * self._steps + sum(self._at.values())
        self._progress.update(self._all, completed=completed)
        if not self._console.is_terminal and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + LINE_EVERY_SECONDS
            running = ", ".join(f"{key} at {step}" for key, step in sorted(self._at.items()))
            share = completed / (self._runs * self._steps)
            self._console.print(f"{share:.0%} of all steps; {running}", highlight=False, soft_wrap=True)
