"""Writes events to a file in the background: who records waits for nothing, whatever the disk does."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import logging
import os
import secrets
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from preconditioner_protos.history.events import Event, HistoryError, Kind, Scope
from preconditioner_protos.packing import pack

logger = logging.getLogger(__name__)

MAX_EVENTS = 65536
"""That may wait for the writer; more are dropped and counted."""

MAX_MATRIX_BYTES = 128 * 1024 * 1024
"""Of matrices that may wait for the writer; events beyond it have no digests."""

_PERIOD = 0.03
_CLOSE_SECONDS = 5.0

_open: weakref.WeakSet[HistoryRecorder] = weakref.WeakSet()


def digest_of(matrix: Any) -> str:
    """Name of a symmetric matrix, full (n, n) or packed, see :mod:`preconditioner_protos.history.events`."""
    return _digest(_packed(matrix))


def load_matrix(folder: Path, digest: str) -> npt.NDArray[np.float32] | None:
    """The packed matrix of that name, shape ``(n (n + 1) / 2,)``; None if it was not saved whole."""
    try:
        values = np.load(folder / f"{digest}.npy", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    packed: npt.NDArray[np.float32] = np.asarray(values, dtype="<f4")
    return packed if _digest(packed) == digest else None


def _packed(matrix: Any) -> npt.NDArray[np.float32]:
    values = np.asarray(matrix)
    return np.ascontiguousarray(pack(values) if values.ndim == 2 else values, dtype="<f4")


def _digest(packed: npt.NDArray[np.float32]) -> str:
    return hashlib.sha256(packed.tobytes()).hexdigest()[:32]


class _Waiting(NamedTuple):
    number: int
    at: float
    wall: float
    kind: Kind
    scope: Scope | None
    block: int | None
    version: int | None
    step: int | None
    sides: Sequence[Any] | None
    data: dict[str, Any]


class HistoryRecorder:
    """Appends events to a file, from any thread of the process that made it.

    :meth:`record` takes a lock that is never held over I/O, and costs microseconds. A thread of its own makes
    digests, saves matrices and writes, about every 30 ms, so a killed process loses no more than that. What
    does not fit the queue or the disk is dropped and counted in the history itself. In a forked child it does
    nothing.

    Args:
        path: file to append to; several processes may share it.
        role: ``trainer``, ``service`` or ``harness``.
        matrices: folder to save snapshots and roots to, as ``DIGEST.npy``; None: digests alone.

    Raises:
        HistoryError: the file cannot be opened, or the folder cannot be made.
    """

    def __init__(self, path: Path | str, role: str, matrices: Path | str | None = None) -> None:
        self._path = Path(path)
        self._matrices = None if matrices is None else Path(matrices)
        self._source = secrets.token_hex(6)
        self._pid = os.getpid()
        # Reentrant, since a finalizer that records may run anywhere, also within.
        self._lock = threading.RLock()
        self._queue: list[_Waiting] = []
        self._queued_bytes = 0
        self._numbers = 0
        self._dropped = 0
        self._unsaid = 0
        self._stopping = threading.Event()
        self._idle = threading.Condition(self._lock)
        self._writing = False
        self._warned = False
        self._closed = False
        try:
            if self._matrices is not None:
                self._matrices.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            # A writer before may have been killed in the middle of a line.
            self._torn = os.fstat(self._file).st_size > 0
        except OSError as error:
            raise HistoryError(
                f"history {str(error.filename or path)!r}: {error.strerror}; give a file in a folder that "
                "exists and may be written to"
            ) from None
        _open.add(self)
        self.record(Kind.RECORDER_OPENED, role=role, pid=self._pid)
        self._thread = threading.Thread(target=self._run, name="preconditioner-history", daemon=True)
        self._thread.start()

    def record(
        self,
        kind: Kind,
        scope: Scope | None = None,
        *,
        block: int | None = None,
        version: int | None = None,
        step: int | None = None,
        sides: Sequence[Any] | None = None,
        **data: Any,
    ) -> None:
        """Queue an event. Never blocks, never raises, and after :meth:`close` does nothing.

        Args:
            kind: what happened.
            scope: whom it is about.
            block: see :class:`Event`.
            version: see :class:`Event`.
            step: see :class:`Event`.
            sides: symmetric matrices in host memory, full or packed, that nobody writes to any more; they
                become ``digests``.
            **data: what else the kind has; nothing that changes later.
        """
        if os.getpid() != self._pid or self._closed:
            return
        nbytes = sum(side.nbytes for side in sides) if sides else 0
        with self._lock:
            number = self._numbers
            self._numbers += 1
            if len(self._queue) >= MAX_EVENTS:
                self._dropped += 1
                return
            if self._queued_bytes + nbytes > MAX_MATRIX_BYTES:
                sides, nbytes = (), 0
            self._queued_bytes += nbytes
            waiting = _Waiting(
                number, time.monotonic(), time.time(), kind, scope, block, version, step, sides, data
            )
            self._queue.append(waiting)

    def flush(self, timeout: float = _CLOSE_SECONDS) -> bool:
        """Wait until all that was recorded before is written; False if it was not within ``timeout``."""
        with self._lock:
            return self._idle.wait_for(lambda: not self._queue and not self._writing, timeout)

    def close(self) -> None:
        """Write what waits, and end. Idempotent; blocks for seconds at most."""
        if self._closed or os.getpid() != self._pid:
            return
        self.record(Kind.RECORDER_CLOSED)
        self._closed = True
        self._stopping.set()
        self._thread.join(_CLOSE_SECONDS)

    # -- the writing thread --------------------------------------------------------------------------

    def _run(self) -> None:
        stopped = False
        while not stopped:
            stopped = self._stopping.wait(_PERIOD)
            with self._lock:
                batch, self._queue, self._queued_bytes = self._queue, [], 0
                lost, self._dropped = self._dropped, 0
                self._writing = bool(batch)
            self._unsaid += lost
            try:
                self._write(batch)
            except Exception:
                # A bug here must cost the history alone.
                self._unsaid += len(batch)
                self._warn("unexpected error", exc_info=True)
            with self._lock:
                self._writing = False
                self._idle.notify_all()
        os.close(self._file)

    def _write(self, batch: list[_Waiting]) -> None:
        for start in range(0, len(batch), 256):
            part = batch[start : start + 256]
            lines = [self._event(waiting).line() for waiting in part]
            if self._unsaid:
                with self._lock:
                    number = self._numbers
                    self._numbers += 1
                lost = Event(
                    kind=Kind.RECORDER_LOST,
                    at=part[0].at,
                    wall=part[0].wall,
                    source=self._source,
                    number=number,
                    data={"events": self._unsaid},
                )
                # Not as the last line, which tells whether the recorder was closed.
                lines.insert(0, lost.line())
            if self._append(b"".join(lines)):
                self._unsaid = 0
            else:
                self._unsaid += len(part)

    def _append(self, text: bytes) -> bool:
        """Write all of it, or remember that a part of it stands in the file."""
        view = memoryview(b"\n" + text if self._torn else text)
        try:
            while view:
                written = os.write(self._file, view)
                self._torn = True
                view = view[written:]
        except OSError as error:
            self._warn(f"{error.strerror}")
            return False
        self._torn = False
        return True

    def _event(self, waiting: _Waiting) -> Event:
        data = waiting.data
        if waiting.sides is not None:
            # Empty, where the queue had no room for them.
            data = {**data, "digests": [self._keep(side) for side in waiting.sides] or None}
        job, rank, epoch = waiting.scope or (None, None, None)
        return Event(
            kind=waiting.kind,
            at=round(waiting.at, 6),
            wall=round(waiting.wall, 6),
            source=self._source,
            number=waiting.number,
            job=job,
            rank=rank,
            epoch=epoch,
            block=waiting.block,
            version=waiting.version,
            step=waiting.step,
            data=data,
        )

    def _keep(self, side: Any) -> str:
        packed = _packed(side)
        digest = _digest(packed)
        if self._matrices is None:
            return digest
        path = self._matrices / f"{digest}.npy"
        if path.exists():
            return digest
        part = path.with_name(f"{digest}.{self._source}")
        try:
            with part.open("wb") as file:
                np.save(file, packed, allow_pickle=False)
            part.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                part.unlink()
            self._warn(f"{self._matrices}: {error.strerror}")
        return digest

    def _warn(self, why: str, exc_info: bool = False) -> None:
        if not self._warned:
            self._warned = True
            logger.warning("history %s: %s; events are lost and counted", self._path, why, exc_info=exc_info)


@atexit.register
def _close_all() -> None:
    for recorder in list(_open):
        recorder.close()
