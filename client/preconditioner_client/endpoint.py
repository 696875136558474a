"""Where the service is: one that somebody else runs, or the embedded one of this process."""

from __future__ import annotations

import importlib.util
import os
import threading
from dataclasses import dataclass
from typing import ClassVar, Protocol

from preconditioner_client.embedded import EmbeddedService
from preconditioner_client.exchange import ExchangeError
from preconditioner_client.service_config import ServiceConfig

INSTALL_HINT = "install async-preconditioner[service] from its checkout or wheel"


class Endpoint(Protocol):
    """Where the service is now."""

    def locate(self, timeout: float) -> tuple[str, str | None] | None:
        """Address and token; None if there is none within ``timeout`` seconds, but there may be later.

        Raises:
            ExchangeError: there will never be one.
            ValueError: the token cannot be read.
        """

    def release(self) -> None:
        """Not needed any more. Called once, from the background; may block for seconds."""


@dataclass(frozen=True, slots=True)
class FixedEndpoint:
    """A service that somebody else runs."""

    config: ServiceConfig

    def locate(self, timeout: float) -> tuple[str, str | None]:
        """See :class:`Endpoint`."""
        return self.config.address, self.config.read_token()

    def release(self) -> None:
        """See :class:`Endpoint`."""


class EmbeddedEndpoint:
    """The embedded service of this process, shared by all optimizers that want the same settings.

    The first makes it, the last to be released ends it.
    """

    _shared: ClassVar[dict[tuple[int, int | None], tuple[EmbeddedService, int]]] = {}
    _guard: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, config: ServiceConfig) -> None:
        self._key = (os.getpid(), config.workers)
        with self._guard:
            service, users = self._shared.get(self._key, (None, 0))
            if service is None:
                service = EmbeddedService(config.workers, config.start_timeout)
            self._shared[self._key] = (service, users + 1)
        self.service = service

    def locate(self, timeout: float) -> tuple[str, str] | None:
        """See :class:`Endpoint`."""
        return self.service.locate(timeout)

    def release(self) -> None:
        """See :class:`Endpoint`."""
        with self._guard:
            service, users = self._shared[self._key]
            if users > 1:
                self._shared[self._key] = (service, users - 1)
                return
            del self._shared[self._key]
        service.close()


def _renew_guard() -> None:
    EmbeddedEndpoint._guard = threading.Lock()  # another thread may have held it when the fork happened


os.register_at_fork(after_in_child=_renew_guard)


def check_installed() -> None:
    """Look whether an embedded service can be started, importing nothing of it.

    Raises:
        ExchangeError: something is not installed; with the command that does it.
    """
    for module in ("preconditioner_service", "ray"):
        if importlib.util.find_spec(module) is None:
            raise ExchangeError(
                f"service='embedded' needs {module}, which is not installed here: {INSTALL_HINT}, or "
                f"give the address of a running service, as in service='host:50051'"
            )
