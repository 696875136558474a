"""A TCP link on loopback that can be made bad: cut, stalled, delayed, slowed, half lost.

A userspace stand-in for ``tc netem``, which needs rights that most machines do not give. TCP repairs lost
segments, so what a stream sees of loss is late bytes: :attr:`FaultyLink.drop` makes a piece late by a
retransmission timeout with that probability.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import threading
from collections.abc import Callable
from typing import Any

_PIECE = 64 * 1024
_RETRANSMISSION_SECONDS = 0.2
"""Linux's smallest retransmission timeout (RTO_MIN)."""

_UNSENT = 4 * 1024 * 1024
"""Bytes that a slow link holds back before it stops reading, as a router's queue would."""


class FaultyLink:
    """Listens on a free port and forwards to ``upstream``; attributes may be set at any time.

    Args:
        upstream: (host, port) of the service. It need not be there yet.
        seed: of what is dropped.

    All methods may be called from any thread.

    Attributes:
        address: ``host:port`` to connect to.
        delay: seconds that every byte takes, each way.
        drop: probability that a piece needs another transmission.
        rate: bytes per second, each way; None: not bounded.
        refused: connections that found nobody upstream.
        accepted: connections so far.
    """

    def __init__(self, upstream: tuple[str, int], seed: int = 0) -> None:
        self.delay = 0.0
        self.drop = 0.0
        self.rate: float | None = None
        self.refused = 0
        self.accepted = 0
        self._upstream = upstream
        self._random = random.Random(seed)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._links: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._closing = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="faulty-link", daemon=True)
        self._thread.start()

    def cut(self) -> None:
        """Break all connections with a reset; new ones are taken."""
        self._call(self._reset)

    def stall(self) -> None:
        """Let nothing through, without a sign: a partition, or a half-open connection. New ones hang, too."""
        self._call(self._flowing.clear)

    def heal(self) -> None:
        """Let everything through again, and at full speed."""
        self.delay, self.drop, self.rate = 0.0, 0.0, None
        self._call(self._flowing.set)

    def close(self) -> None:
        """Break all connections and stop listening. Idempotent."""
        if self._thread.is_alive():
            self._call(self._closing.set)
            self._thread.join(5.0)

    def __enter__(self) -> FaultyLink:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _call(self, function: Callable[[], Any]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, and all connections with it
            self._loop.call_soon_threadsafe(function)

    # -- in the loop's thread ------------------------------------------------------------------------

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._accepted, sock=self._listener, limit=_PIECE)
        await self._closing.wait()
        server.close()
        self._reset()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _reset(self) -> None:
        for ends in list(self._links):
            for end in ends:
                end.transport.abort()

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        await self._flowing.wait()
        try:
            up_reader, up_writer = await asyncio.open_connection(*self._upstream, limit=_PIECE)
        except OSError:
            self.refused += 1
            writer.transport.abort()
            return
        ends = (writer, up_writer)
        self._links.add(ends)
        pumps = [
            self._loop.create_task(self._pump(reader, up_writer)),
            self._loop.create_task(self._pump(up_reader, writer)),
        ]
        self._tasks.update(pumps)
        try:
            await asyncio.gather(*pumps, return_exceptions=True)
        finally:
            self._tasks.difference_update(pumps)
            self._links.discard(ends)
            for end in ends:
                end.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Reads in one task and writes in another, so that a delay holds up no later byte."""
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(maxsize=_UNSENT // _PIECE)
        ends = {
            self._loop.create_task(self._read(reader, queue)),
            self._loop.create_task(self._write(queue, writer)),
        }
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for end in ends:
                end.cancel()
            await asyncio.gather(*ends, return_exceptions=True)

    async def _read(self, reader: asyncio.StreamReader, queue: asyncio.Queue[tuple[float, bytes]]) -> None:
        piece = b"-"
        while piece:
            piece = await reader.read(_PIECE)
            due = self._loop.time() + self.delay
            if self.drop and self._random.random() < self.drop:
                due += _RETRANSMISSION_SECONDS
            await queue.put((due, piece))

    async def _write(self, queue: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
        while True:
            due, piece = await queue.get()
            await asyncio.sleep(max(0.0, due - self._loop.time()))
            if self.rate is not None:
                await asyncio.sleep(len(piece) / self.rate)
            await self._flowing.wait()
            if not piece:
                writer.write_eof()
                return
            writer.write(piece)
            await writer.drain()
