"""Logging of the service: one line per event, to stderr, since stdout carries the ready line."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, MutableMapping
from typing import Any

LOGGER = logging.getLogger("preconditioner_service")


def event(level: int, name: str, **fields: Any) -> None:
    """Log one event: its name and ``key=value`` pairs. Never hand secrets to it."""
    LOGGER.log(level, name, extra={"fields": fields})


class Limiter:
    """Lets one event of a kind pass every few seconds, so that nobody can fill the log.

    Args:
        period: seconds.
        kinds: how many are remembered; the oldest are forgotten.
        clock: monotonic seconds.
    """

    def __init__(
        self, period: float = 10.0, kinds: int = 1024, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._period = period
        self._kinds = kinds
        self._clock = clock
        self._last: OrderedDict[Hashable, tuple[float, int]] = OrderedDict()

    def passes(self, kind: Hashable) -> int | None:
        """How many of this kind were held back since the last that passed; ``None`` holds this one back."""
        now = self._clock()
        last, held = self._last.get(kind, (-math.inf, 0))
        if now - last < self._period:
            self._last[kind] = (last, held + 1)
            return None
        self._last[kind] = (now, 0)
        self._last.move_to_end(kind)
        while len(self._last) > self._kinds:
            self._last.popitem(last=False)
        return held


_LIMITER = Limiter()


def limited(level: int, name: str, kind: Hashable, **fields: Any) -> None:
    """Log an event that a caller can bring about at will, at most one every ten seconds of its kind."""
    if not LOGGER.isEnabledFor(level):
        return
    if (held := _LIMITER.passes((name, kind))) is not None:
        event(level, name, **fields, **({"held_back": held} if held else {}))


def set_up(level: str, log_format: str) -> None:
    """Send this package's events to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if log_format == "json" else _Text())
    LOGGER.handlers[:] = [handler]
    LOGGER.setLevel(level.upper())
    LOGGER.propagate = False


def quiet_grpc(environ: MutableMapping[str, str]) -> None:
    """Keep gRPC, not yet imported, from writing lines of its own on stderr that strangers can bring about.

    By default it writes one for each failed handshake. What ``GRPC_VERBOSITY`` says already holds.
    """
    environ.setdefault("GRPC_VERBOSITY", "ERROR")


def _stamp(record: logging.LogRecord) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return getattr(record, "fields", {})


def _quoted(value: object) -> str:
    text = str(value)
    plain = text.isprintable() and not any(character in text for character in ' "=\\')
    return text if text and plain else json.dumps(text)


class _Text(logging.Formatter):
    """``TIME LEVEL event key=value ...``; values from the wire cannot forge a line."""

    def format(self, record: logging.LogRecord) -> str:
        pairs = "".join(f" {key}={_quoted(value)}" for key, value in _fields(record).items())
        text = f"{_stamp(record)} {record.levelname} {record.getMessage()}{pairs}"
        return text + "\n" + self.formatException(record.exc_info) if record.exc_info else text


class _Json(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {"time": _stamp(record), "level": record.levelname.lower(), "event": record.getMessage()}
        entry.update({key: str(value) for key, value in _fields(record).items() if key not in entry})
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)
