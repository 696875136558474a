"""How a run shows itself: a live bar on a terminal, now and then a line anywhere else."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY_SECONDS = 20.0


class Display(Protocol):
    """Is told of every step."""

    def __enter__(self) -> Display:
        """Begin."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End."""

    def step(
        self, step: int, *, loss: float, held_out: float, seconds: float, age: int | None, versions: int
    ) -> None:
        """After each step; ``held_out`` is the newest held-out loss, NaN before the first."""


class _Bar:
    def __init__(self, label: str, steps: int, console: Console) -> None:
        self._progress = Progress(
            TextColumn("[bold]{task.description:<10}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task(label, total=steps, state="")

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def step(
        self, step: int, *, loss: float, held_out: float, seconds: float, age: int | None, versions: int
    ) -> None:
        self._progress.update(
            self._task, completed=step, state=_describe(loss, held_out, seconds, age, versions)
        )


class _Lines:
    def __init__(self, label: str, steps: int, console: Console) -> None:
        self._label, self._steps, self._console = label, steps, console
        self._next = time.monotonic() + LINE_EVERY_SECONDS

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def step(
        self, step: int, *, loss: float, held_out: float, seconds: float, age: int | None, versions: int
    ) -> None:
        if time.monotonic() >= self._next or step == self._steps:
            self._next = time.monotonic() + LINE_EVERY_SECONDS
            state = _describe(loss, held_out, seconds, age, versions)
            self._console.print(f"{self._label} {step}/{self._steps} {state}", highlight=False)


def _describe(loss: float, held_out: float, seconds: float, age: int | None, versions: int) -> str:
    text = f"loss {loss:.3f}, held-out {held_out:.3f}, {seconds * 1e3:.0f} ms"
    return text if age is None else f"{text}, age {age}, versions {versions}"


def display(label: str, steps: int, console: Console) -> Display:
    """The display that fits ``console``."""
    return _Bar(label, steps, console) if console.is_terminal else _Lines(label, steps, console)
