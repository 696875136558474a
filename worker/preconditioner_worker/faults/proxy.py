"""A TCP proxy between trainers and a service that delays, paces, stalls and cuts what passes through.

It needs no rights, unlike a network namespace. What it cannot do is lose a packet: TCP has mended that before
the bytes are here. So a loss is a stall for as long as the retransmission would have taken.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from types import TracebackType

_SEGMENT_BYTES = 1448
_READ_BYTES = 64 * 1024
_RETRANSMISSION_SECONDS = 0.2
_QUEUED_READS = 16


class Way(Enum):
    """Direction of bytes, as the trainer sees it."""

    UP = "up"
    DOWN = "down"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How one direction treats what passes.

    Attributes:
        delay: seconds from one end to the other.
        loss: share of the segments that have to be sent again, [0, 1).
        rate: bit/s; None: as fast as it goes.
    """

    delay: float = 0.0
    loss: float = 0.0
    rate: float | None = None

    def __post_init__(self) -> None:
        if self.delay < 0:
            raise ValueError(f"delay must be >= 0 seconds, not {self.delay}")
        if not 0 <= self.loss < 1:
            raise ValueError(f"loss must be in [0, 1), not {self.loss}")
        if self.rate is not None and self.rate <= 0:
            raise ValueError(f"rate must be > 0 bit/s, not {self.rate}")


class _Connection:
    """One trainer's connection and the one to the service that belongs to it."""

    def __init__(self, trainer: asyncio.StreamWriter, service: asyncio.StreamWriter) -> None:
        self.ends = {Way.DOWN: trainer, Way.UP: service}
        self.tasks: list[asyncio.Task[None]] = []


class Proxy:
    """Listens on loopback and forwards to ``upstream``, in a thread of its own.

    Connections are made while it passes bytes; while it is cut they are taken, and nothing answers.

    Args:
        upstream: ``host:port`` of the service.
        seed: of the losses.

    Attributes:
        address: ``host:port`` for trainers.
    """

    def __init__(self, upstream: str, seed: int = 0) -> None:
        host, _, port = upstream.rpartition(":")
        self._upstream = (host.strip("[]"), int(port))
        self._random = random.Random(seed)
        self._shapes = dict.fromkeys(Way, Shape())
        self._allowed: dict[Way, tuple[int, threading.Event]] = {}
        self._connections: set[_Connection] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)
        self._thread.start()
        self._passing = {way: asyncio.Event() for way in Way}
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._accept, "127.0.0.1", 0), self._loop
        ).result()
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        self.heal()

    def shape(self, shape: Shape, *ways: Way) -> None:
        """Treat bytes like this from now on; without ``ways``, in both directions."""
        self._do(lambda: self._shapes.update(dict.fromkeys(ways or Way, shape)))

    def stall(self, *ways: Way) -> None:
        """Let nothing pass and tell nobody: a reader that does not read, or without ``ways`` a cut wire."""

        def stalled() -> None:
            for way in ways or Way:
                self._passing[way].clear()

        self._do(stalled)

    def stall_after(self, nbytes: int, way: Way) -> threading.Event:
        """Let exactly so many bytes more pass in one direction, over all connections, then stall it.

        Returns:
            An event that is set when the last of them was handed to the other end.
        """
        if nbytes < 1:
            raise ValueError(f"nbytes must be >= 1, not {nbytes}")
        stalled = threading.Event()
        self._do(lambda: self._allowed.update({way: (nbytes, stalled)}))
        return stalled

    def heal(self) -> None:
        """Let everything pass as if nothing had been."""

        def healed() -> None:
            self._allowed.clear()
            self._shapes = dict.fromkeys(Way, Shape())
            for passing in self._passing.values():
                passing.set()

        self._do(healed)

    def drop(self) -> None:
        """Break every connection, for both ends to see."""

        def dropped() -> None:
            for connection in list(self._connections):
                self._end(connection)

        self._do(dropped)

    def vanish(self, way: Way) -> None:
        """Let one end of every connection disappear without a word to the other, which stays half open.

        Args:
            way: where the end lies that disappears: ``UP`` the service, ``DOWN`` the trainer.
        """

        def vanished() -> None:
            for connection in self._connections:
                for task in connection.tasks:
                    task.cancel()
                connection.ends[way].transport.abort()

        self._do(vanished)

    def close(self) -> None:
        """Break every connection and take no more. Idempotent."""
        if not self._thread.is_alive():
            return
        self._do(self._server.close)
        self.drop()
        asyncio.run_coroutine_threadsafe(self._settle(), self._loop).result(5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # -- in the loop ---------------------------------------------------------------------------------

    def _do(self, action: Callable[[], object]) -> None:
        async def run() -> None:
            action()

        asyncio.run_coroutine_threadsafe(run(), self._loop).result(5)

    async def _settle(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self, from_trainer: asyncio.StreamReader, to_trainer: asyncio.StreamWriter) -> None:
        try:
            for passing in self._passing.values():
                await passing.wait()
            from_service, to_service = await asyncio.open_connection(*self._upstream)
        except (OSError, asyncio.CancelledError):
            to_trainer.transport.abort()
            return
        connection = _Connection(to_trainer, to_service)
        self._connections.add(connection)
        connection.tasks = [
            asyncio.ensure_future(self._pump(connection, way, source))
            for way, source in ((Way.UP, from_trainer), (Way.DOWN, from_service))
        ]

    async def _pump(self, connection: _Connection, way: Way, source: asyncio.StreamReader) -> None:
        """Carry one direction; what is under way is bounded, so that a stall is felt by the sender."""
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_QUEUED_READS)

        async def read() -> None:
            while True:
                data = b""
                with contextlib.suppress(OSError):
                    data = await source.read(_READ_BYTES)
                await queue.put((self._loop.time() + self._shapes[way].delay, data))
                if not data:
                    return

        reading = asyncio.ensure_future(read())
        try:
            while True:
                due, data = await queue.get()
                await asyncio.sleep(due - self._loop.time())
                await self._passing[way].wait()
                if not data:
                    break
                await self._hold(way, len(data))
                while data:
                    await self._passing[way].wait()
                    passes = self._pass(way, len(data))
                    connection.ends[way].write(data[:passes])
                    data = data[passes:]
                    await connection.ends[way].drain()
            self._end(connection)
        except OSError:
            self._end(connection)
        finally:
            reading.cancel()

    async def _hold(self, way: Way, size: int) -> None:
        """The time that rate and losses cost these bytes."""
        shape = self._shapes[way]
        segments = -(-size // _SEGMENT_BYTES)
        lost = sum(self._random.random() < shape.loss for _ in range(segments))
        seconds = lost * (_RETRANSMISSION_SECONDS + 2 * shape.delay)
        if shape.rate is not None:
            seconds += size * 8 / shape.rate
        if seconds:
            await asyncio.sleep(seconds)

    def _pass(self, way: Way, size: int) -> int:
        """How many of these bytes pass now; the last that may stall the direction."""
        if way not in self._allowed:
            return size
        allowed, stalled = self._allowed[way]
        if size < allowed:
            self._allowed[way] = allowed - size, stalled
            return size
        del self._allowed[way]
        self._passing[way].clear()
        stalled.set()
        return allowed

    def _end(self, connection: _Connection) -> None:
        self._connections.discard(connection)
        for end in connection.ends.values():
            end.transport.abort()
