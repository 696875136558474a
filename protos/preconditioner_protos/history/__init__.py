"""Histories: what clients, services and whoever injects faults record, as JSON lines, for a checker to judge.

:mod:`~preconditioner_protos.history.events` is the format's specification, ``HistoryRecorder`` writes it from
any thread without I/O on that thread, and ``read_history`` reads any number of files.
"""

from preconditioner_protos.history.events import FORMAT, Event, HistoryError, Kind, Scope
from preconditioner_protos.history.reading import History, Source, read_history
from preconditioner_protos.history.recorder import HistoryRecorder, digest_of, load_matrix

__all__ = [
    "FORMAT",
    "Event",
    "History",
    "HistoryError",
    "HistoryRecorder",
    "Kind",
    "Scope",
    "Source",
    "digest_of",
    "load_matrix",
    "read_history",
]
