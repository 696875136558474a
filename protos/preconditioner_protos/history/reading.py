"""Histories as they are read back: any number of files, written by any number of processes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from preconditioner_protos.history.events import Event, HistoryError, Kind


@dataclass(slots=True)
class Source:
    """One recorder's part of a history.

    Attributes:
        name: of the recorder.
        role: trainer, service or harness; empty where the first line is missing.
        first: ``at`` of its first event.
        last: ``at`` of its last event.
        closed: whether it ended in order, and so says all up to its end.
        missing: how many events are known to be missing between the first and the last.
    """

    name: str
    role: str = ""
    first: float = 0.0
    last: float = 0.0
    closed: bool = False
    missing: int = 0


@dataclass(slots=True)
class History:
    """Events of all files, ordered by time.

    Attributes:
        events: each of a source in the order of its numbers.
        sources: by name.
        torn: lines that were cut off by the death of their writer, or by a full disk.
    """

    events: list[Event] = field(default_factory=list)
    sources: dict[str, Source] = field(default_factory=dict)
    torn: int = 0

    @property
    def holes(self) -> int:
        """Events that are known to be missing."""
        return sum(source.missing for source in self.sources.values())


def read_history(paths: Iterable[Path | str]) -> History:
    """Read files that :class:`HistoryRecorder` wrote.

    A torn line is what a killed writer leaves, and is skipped and counted; whole lines must be events.

    Raises:
        HistoryError: a file cannot be read, or a whole line is no event.
    """
    history = History()
    for path in paths:
        _read(Path(path), history)
    by_source: dict[str, list[Event]] = {}
    for event in history.events:
        by_source.setdefault(event.source, []).append(event)
    for name, events in by_source.items():
        events.sort(key=lambda event: event.number)
        history.sources[name] = _summary(name, events)
    # Numbers and times are given out under one lock: by time is by number, too.
    history.events.sort(key=lambda event: (event.at, event.source, event.number))
    return history


def _summary(name: str, events: list[Event]) -> Source:
    opened = events[0] if events[0].kind is Kind.RECORDER_OPENED else None
    span = events[-1].number - events[0].number + 1 + (events[0].number if opened is None else 0)
    return Source(
        name,
        role=str(opened.data["role"]) if opened is not None else "",
        first=min(event.at for event in events),
        last=max(event.at for event in events),
        closed=any(event.kind is Kind.RECORDER_CLOSED for event in events),
        missing=span - len(events),
    )


def _read(path: Path, history: History) -> None:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise HistoryError(f"{path}: {error.strerror}") from None
    # What follows the last line's end is a line that its writer did not finish, or nothing.
    unfinished = lines.pop()
    history.torn += bool(unfinished)
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            history.events.append(Event.parse(line))
        except HistoryError as error:
            if _cut_off(line):
                history.torn += 1
                continue
            raise HistoryError(f"{path}, line {number}: {error}") from None


def _cut_off(line: bytes) -> bool:
    """Whether a line is the beginning of one: the next writer ends it before it goes on."""
    return line.startswith(b"{") and not line.endswith(b"}")
