"""The service's gRPC end in a thread of the test's own process, without a pool: nothing is ever computed."""

from __future__ import annotations

import asyncio
import contextlib
import io
import threading

import grpc

from preconditioner_protos.v1 import preconditioner_pb2_grpc as pb_grpc
from preconditioner_service import serve
from preconditioner_service.settings import ServeSettings
from raw_trainer import RawTrainer

POLL_SECONDS = 0.05


class InProcessService:
    """Listens until :meth:`stop`. Files are looked at every :data:`POLL_SECONDS`."""

    def __init__(self, **settings: object) -> None:
        self._ready = threading.Event()
        self._settings = ServeSettings(**settings)
        self._failed: Exception | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)
        self._thread.start()
        assert self._ready.wait(30)
        if self._failed is not None:
            self._thread.join()
            raise self._failed

    async def _main(self) -> None:
        try:
            self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
            self._run = serve._Run(self._settings, io.StringIO())
            server = self._run._server()
            self.address = self._run._listen(server)
            await server.start()
        except Exception as error:
            self._failed = error
            self._ready.set()
            return
        reloading = asyncio.create_task(self._keep_reloading())
        self._ready.set()
        await self._stop.wait()
        reloading.cancel()
        self._run._service.end_streams()
        await server.stop(0.2)
        await self._run._dispatcher.stop()

    async def _keep_reloading(self) -> None:
        while True:
            await asyncio.sleep(POLL_SECONDS)
            self._run._reload()

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def share(self, job: str):
        """What the job may take of the workers."""
        return next(known.share for known in self._run._board.jobs if known.name == job)

    def trainer(self, token: str, credentials: grpc.ChannelCredentials | None = None) -> RawTrainer:
        trainer = RawTrainer(self.address, token)
        if credentials is not None:
            trainer.channel.close()
            options = [("grpc.use_local_subchannel_pool", 1)]
            trainer.channel = grpc.secure_channel(f"localhost:{self.port}", credentials, options)
            trainer.stub = pb_grpc.PreconditionerServiceStub(trainer.channel)
        return trainer

    def stop(self) -> None:
        with contextlib.suppress(RuntimeError):  # its loop is over
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)
        assert not self._thread.is_alive()
