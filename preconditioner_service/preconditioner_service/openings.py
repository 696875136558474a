"""Requests for sessions, in turn: a large manifest takes seconds to check, and must hold up no stream.

Small ones are handled at once. Large ones are parsed and checked in a thread, one after the other, with a
pause after each, so that whoever opens one after the other takes a bounded share of the interpreter.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import grpc

from preconditioner_service.calls import EndOfStream

Run: TypeAlias = Callable[..., Awaitable[Any]]

_LARGE_BYTES = 64 * 1024
_MOST_IN_LINE = 8
"""Large requests that wait, each of up to a message."""

_PAUSE = 2.0
"""Of what a large request took, before the next one's turn."""


class Openings:
    """Whose turn it is to open a session."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._in_line = 0
        self._free_at = 0.0

    @asynccontextmanager
    async def turn(self, nbytes: int) -> AsyncIterator[Run]:
        """Wait for a turn; its value runs a function where this request's size lets it.

        Args:
            nbytes: of the request.

        Raises:
            EndOfStream: UNAVAILABLE if too many are in line.
        """
        if nbytes <= _LARGE_BYTES:
            yield _inline
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
