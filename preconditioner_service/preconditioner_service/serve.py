"""One service from start to stop: pool, gRPC server, ready line, drain.

The one line of JSON on stdout is the contract with whoever started the process::

    {"event": "ready", "address": "127.0.0.1:40123", "pid": 4711}
    {"event": "failed", "reason": "..."}

Everything else goes to stderr.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Coroutine
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

import grpc
import grpc.aio

from preconditioner_protos.history import HistoryError
from preconditioner_service import logs, wire
from preconditioner_service.arrivals import Arrivals, pace_arrivals
from preconditioner_service.auth import BearerToken
from preconditioner_service.board import Board
from preconditioner_service.calls import WaitingRoom, make_calls_droppable
from preconditioner_service.dispatcher import Dispatcher
from preconditioner_service.files import FileError
from preconditioner_service.health import Health
from preconditioner_service.history import HELD_SECONDS, ServiceHistory
from preconditioner_service.logs import event
from preconditioner_service.machine import is_loopback
from preconditioner_service.parent import ParentWatch
from preconditioner_service.policy import Policy
from preconditioner_service.pool import PoolError, PoolSettings, RayPool
from preconditioner_service.quarantine import Quarantine, QuarantineLimits
from preconditioner_service.reloading import POLL_SECONDS
from preconditioner_service.server import ExchangeLimits, Service, enable_reflection
from preconditioner_service.settings import ServeSettings

_STOP_SECONDS = 1.0
"""For calls that are still open when the streams have ended."""


class ServeError(Exception):
    """The service cannot start; the text names the way out."""


class RayLostError(Exception):
    """Ray went away under a running service; the text says how."""


def claim_stdout() -> TextIO:
    """Keep stdout for the ready line: whatever else is written there, as by Ray, goes to stderr."""
    sys.stdout.flush()
    line = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return line


def announce(out: TextIO, **entry: object) -> None:
    """Write the one line, for whoever still reads it."""
    try:
        out.write(json.dumps(entry) + "\n")
        out.flush()
    except OSError:
        pass


def run(settings: ServeSettings, out: TextIO) -> int:
    """Serve until a signal, or the parent's end, and return the exit status."""
    logs.set_up(settings.log_level, settings.log_format)
    # Large manifests are checked in a thread, which by default keeps the streams waiting for 5 ms at a time.
    sys.setswitchinterval(0.0005)
    try:
        asyncio.run(_Run(settings, out).main())
    except (ServeError, PoolError, HistoryError, FileError) as error:
        event(logging.ERROR, "failed", reason=error)
        announce(out, event="failed", reason=str(error))
        return 1
    except RayLostError as error:
        event(logging.ERROR, "failed", reason=error)
        # Hard, since Ray's library waits at the end of the process for its head.
        sys.stderr.flush()
        os._exit(1)
    return 0


class _Run:
    def __init__(self, settings: ServeSettings, out: TextIO) -> None:
        self._settings = settings
        self._out = out
        self._access = settings.open_policy()
        self._tls = None if settings.tls_cert is None else settings.open_tls()
        self._ray_lost = ""
        self._broken = ""
        self._stop = asyncio.Event()
        self._grace = settings.drain_grace
        self._dispatcher = Dispatcher(
            quarantine=Quarantine(
                QuarantineLimits(after=settings.quarantine_after, seconds=settings.quarantine_seconds)
            )
        )
        self._pool = RayPool(
            PoolSettings(
                num_workers=settings.num_workers,
                ray_address=settings.ray_address,
                cpus_per_worker=settings.cpus_per_worker,
                worker_memory_bytes=settings.worker_memory_bytes,
                worker_nice=settings.worker_nice,
                object_store_bytes=settings.object_store_bytes,
                batch_patience=settings.batch_patience,
                start_timeout=settings.start_timeout,
            ),
            self._dispatcher.kick,
        )
        self._dispatcher.use(self._pool)
        self._history: ServiceHistory | None = None
        self._board = Board(
            settings.max_total_bytes,
            settings.session_ttl,
            # One coming and one going, serialized.
            stream_bytes=2 * settings.max_message_bytes,
        )
        if settings.history_file is not None:
            self._history = ServiceHistory(settings.history_file, settings.history_matrices)
            self._board.history = self._history
        self._service = Service(
            self._board,
            self._dispatcher,
            self._policy,
            ExchangeLimits(
                max_message_bytes=settings.max_message_bytes,
                credit_bytes=settings.credit_bytes,
                session_ttl=settings.session_ttl,
                stream_idle_timeout=settings.stream_idle_timeout,
                answer_timeout=settings.answer_timeout,
            ),
            version=_version(),
            workers=lambda: self._pool.alive,
        )
        self._health = Health(settings.max_health_watchers, settings.answer_timeout)

    async def main(self) -> None:
        self._watch()
        self._check_port()
        stopping = asyncio.create_task(self._stop.wait())
        # Ray's processes are forked from this one, and gRPC's threads would make that a gamble: Ray first.
        starting = asyncio.create_task(self._pool.start())
        watching: asyncio.Task[None] | None = None
        try:
            await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not self._stop.is_set():
                await starting
                watching = asyncio.create_task(self._watch_ray())
                await self._serve(stopping)
        finally:
            stopping.cancel()
            starting.cancel()
            if watching is not None:
                watching.cancel()
            await self._dispatcher.stop()
            await self._pool.stop()
            if self._history is not None:
                self._history.close()
            event(logging.INFO, "stopped")
        if self._ray_lost:
            raise RayLostError(self._ray_lost)
        if self._broken:
            raise ServeError(f"a fault of the service: {self._broken}; start it again")

    async def _watch_ray(self) -> None:
        why = await self._pool.until_lost()
        self._ray_lost = f"Ray is lost: {why}; start the service again once it is back"
        self._hurry()

    async def _serve(self, stopping: asyncio.Task[Any]) -> None:
        server = self._server()
        address = self._listen(server)
        await server.start()
        self._server_started()
        self._health.set(True)
        background = [
            self._background("expire sessions", self._service.expire_sessions()),
            self._background("reload files", self._keep_reloading()),
            self._background("record history", self._record_held()),
        ]
        try:
            self._ready(address)
            await stopping
            self._health.set(False)
            event(logging.INFO, "draining", grace_seconds=self._grace)
            if self._history is not None:
                self._history.drain_begun(self._grace)
            settled = await self._service.drain(self._grace)
            event(logging.INFO, "drained", complete=settled)
            if self._history is not None:
                self._history.drain_ended(settled)
        finally:
            for task in background:
                task.cancel()
            await server.stop(_STOP_SECONDS)

    def _background(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Without one of these the service would go on, but not hold what it promises: so it ends."""

        def ended(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and (error := task.exception()) is not None:
                self._broken = f"{name}: {error!r}"
                event(logging.ERROR, "background task failed", task=name, why=repr(error))
                self._stop.set()

        task = asyncio.create_task(work)
        task.add_done_callback(ended)
        return task

    async def _record_held(self) -> None:
        while self._history is not None:
            began = time.monotonic()
            self._board.record_held()
            # The streams wait while many blocks are looked at: for a twentieth of the time at most.
            await asyncio.sleep(max(HELD_SECONDS, 20 * (time.monotonic() - began)))

    def _ready(self, address: str) -> None:
        entry = {"event": "ready", "address": address, "pid": os.getpid()}
        if (path := self._settings.ready_file) is not None:
            _write_whole(path, json.dumps(entry) + "\n")
        event(logging.INFO, "ready", address=address, workers=self._pool.alive)
        announce(self._out, **entry)

    def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled, number)
        loop.add_signal_handler(signal.SIGHUP, self._reload, True)
        loop.add_signal_handler(signal.SIGUSR1, self._release)

        def orphaned(sign: str) -> None:
            event(logging.WARNING, "parent gone", sign=sign)
            loop.call_soon_threadsafe(self._hurry)

        if self._settings.parent_pid is not None:
            ParentWatch(self._settings.parent_pid, orphaned).start()

    def _signalled(self, number: signal.Signals) -> None:
        event(logging.INFO, "signal", signal=number.name)
        if self._stop.is_set():
            self._hurry()  # whoever sends a second one does not want to wait
        self._stop.set()

    def _release(self) -> None:
        event(logging.INFO, "quarantines ended", signal="SIGUSR1", blocks=self._dispatcher.release())

    def _policy(self) -> Policy:
        return self._access.value

    def _reload(self, at_once: bool = False) -> None:
        """Use what changed of tokens, jobs and certificates."""
        if self._tls is not None:
            self._tls.reloading.refresh(at_once=at_once)
        if self._access.refresh(at_once=at_once):
            self._service.policy_changed()

    async def _keep_reloading(self) -> None:
        while True:
            await asyncio.sleep(POLL_SECONDS)
            self._reload()

    def _hurry(self) -> None:
        self._grace = 0.0
        self._service.end_streams()
        self._stop.set()

    def _server(self) -> grpc.aio.Server:
        settings = self._settings
        loop = asyncio.get_running_loop()
        make_calls_droppable(loop)
        self._server_started = pace_arrivals(loop, Arrivals(settings.max_call_rate))
        server = grpc.aio.server(
            interceptors=[BearerToken(self._policy)],
            maximum_concurrent_rpcs=settings.max_streams,
            options=wire.channel_options(settings),
        )
        waiting = WaitingRoom(settings.max_waiting_calls, settings.first_message_timeout)
        wire.add_to(server, self._service, waiting)
        self._health.add_to(server, waiting)
        if settings.reflection:
            enable_reflection(server)
        return server

    def _check_port(self) -> None:
        """Find out at once, not after Ray has started, that the port is taken."""
        host, port = self._settings.host.strip("[]"), self._settings.port
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except OSError as error:
            raise self._cannot_listen(error.strerror or str(error)) from None

    def _cannot_listen(self, why: str) -> ServeError:
        return ServeError(
            f"cannot listen on {self._settings.host} port {self._settings.port} ({why}); "
            "--port 0 takes a free one"
        )

    def _listen(self, server: grpc.aio.Server) -> str:
        settings = self._settings
        host = f"[{settings.host}]" if ":" in settings.host and "[" not in settings.host else settings.host
        try:
            if self._tls is None:
                if not is_loopback(settings.host):
                    event(logging.WARNING, "plaintext", host=settings.host, note="tokens travel readable")
                port = server.add_insecure_port(f"{host}:{settings.port}")
            else:
                port = server.add_secure_port(f"{host}:{settings.port}", self._tls.credentials())
        except RuntimeError as error:
            raise self._cannot_listen(str(error)) from None
        return f"{host}:{port}"


def _write_whole(path: Path, text: str) -> None:
    """Readers see all of it or nothing."""
    part = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise ServeError(f"ready_file {path}: {error.strerror}") from None


def _version() -> str:
    try:
        return version("async-preconditioner")
    except PackageNotFoundError:
        return "unknown"
