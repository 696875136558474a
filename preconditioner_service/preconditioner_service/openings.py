"""Requests for sessions, in turn: a large manifest takes seconds to check, and must hold up no stream.

Small ones are handled at once. All others are parsed and checked in a thread, one after the other, so that
streams have their turn meanwhile: those of a middle size, up to a tenth of a second's work, in a line of
their own, where callers take turns; large ones with a pause after each, so that whoever opens one after the
other takes a bounded share of the interpreter.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import grpc

from preconditioner_service.calls import EndOfStream

Run: TypeAlias = Callable[..., Awaitable[Any]]

_SMALL_BYTES = 4 * 1024
"""Less than ten milliseconds of work: a hundred blocks at the least."""

_LARGE_BYTES = 64 * 1024
_MOST_IN_LINE = 8
"""Large requests that wait, each of up to a message."""

_MOST_OF_MIDDLE_SIZE = 64
"""Those that wait: the ranks of a large job come at the same moment."""

_PAUSE = 2.0
"""Of what a large request took, before the next one's turn."""


class Openings:
    """Whose turn it is to open a session."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._middle = Line(_MOST_OF_MIDDLE_SIZE)
        self._in_line = 0
        self._free_at = 0.0

    @asynccontextmanager
    async def turn(self, nbytes: int, caller: Hashable) -> AsyncIterator[Run]:
        """Wait for a turn; its value runs a function where this request's size lets it.

        Args:
            nbytes: of the request.
            caller: whose it is.

        Raises:
            EndOfStream: UNAVAILABLE if too many are in line.
        """
        if nbytes <= _SMALL_BYTES:
            yield _inline
            return
        if nbytes <= _LARGE_BYTES:
            async with self._middle.turn(caller):
                yield _in_thread
            return
        if self._in_line >= _MOST_IN_LINE:
            raise EndOfStream(
                grpc.StatusCode.UNAVAILABLE,
                f"{_MOST_IN_LINE} requests with large manifests are in line; try again",
            )
        self._in_line += 1
        try:
            async with self._turn:
                await asyncio.sleep(self._free_at - time.monotonic())
                began = time.monotonic()
                try:
                    yield _in_thread
                finally:
                    now = time.monotonic()
                    self._free_at = now + _PAUSE * (now - began)
        finally:
            self._in_line -= 1


class Line:
    """A lock that those who wait for it are given in turn by caller, however many requests each has in line.

    Args:
        most: requests that may wait; a further one displaces the last of the caller who has most, and is
            refused itself if that is its own.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken = False
        self._waiting: dict[Hashable, deque[asyncio.Future[None]]] = {}
        """By caller, whose turn is next first; none is empty."""

    @asynccontextmanager
    async def turn(self, caller: Hashable) -> AsyncIterator[None]:
        """Wait for a turn, and have it.

        Raises:
            EndOfStream: UNAVAILABLE if too many are in line.
        """
        if self._taken:
            await self._wait(caller)
        self._taken = True
        try:
            yield
        finally:
            self._pass_on()

    async def _wait(self, caller: Hashable) -> None:
        self._make_room(caller)
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(caller, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._remove(caller, turn)
            elif turn.exception() is None:
                self._pass_on()
            raise

    def _make_room(self, caller: Hashable) -> None:
        if sum(map(len, self._waiting.values())) < self._most:
            return
        full = EndOfStream(
            grpc.StatusCode.UNAVAILABLE, f"{self._most} requests with manifests are in line; try again"
        )
        greedy = max(self._waiting, key=lambda other: len(self._waiting[other]))
        if len(self._waiting.get(caller, ())) + 1 >= len(self._waiting[greedy]):
            raise full
        last = self._waiting[greedy][-1]
        self._remove(greedy, last)
        last.set_exception(full)

    def _remove(self, caller: Hashable, turn: asyncio.Future[None]) -> None:
        self._waiting[caller].remove(turn)
        if not self._waiting[caller]:
            del self._waiting[caller]

    def _pass_on(self) -> None:
        caller = next(iter(self._waiting), None)
        if caller is None:
            self._taken = False
            return
        turns = self._waiting.pop(caller)
        turns.popleft().set_result(None)
        if turns:
            self._waiting[caller] = turns


async def _inline(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


async def _in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    work = asyncio.ensure_future(asyncio.to_thread(function, *arguments))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        # A thread cannot be stopped: whoever resets calls at once would have one for each otherwise.
        await asyncio.wait({work})
        if not work.cancelled():
            work.exception()  # nobody else asks for it
        raise
