"""The exchange with a preconditioner service over gRPC: what the optimizer holds.

Everything slow happens in the background: connecting, waiting for copies from the device, packing, sending,
receiving, checking, unpacking. The training thread only ever touches the :class:`Mailbox`.
"""

from __future__ import annotations

import atexit
import logging
import os
import weakref
from collections.abc import Sequence

from preconditioner_client.connection import preflight
from preconditioner_client.endpoint import EmbeddedEndpoint, Endpoint, FixedEndpoint, check_installed
from preconditioner_client.exchange import Arrival, Rejection, SessionSpec, Snapshot
from preconditioner_client.mailbox import Mailbox
from preconditioner_client.recording import TrainerHistory
from preconditioner_client.service_config import ServiceConfig
from preconditioner_client.supervisor import Supervisor
from preconditioner_protos.history import HistoryRecorder

logger = logging.getLogger("preconditioner_client")

_SERVICE_END_SECONDS = 15.0
_live: set[_Background] = set()
"""Those whose thread has not ended: a collected exchange is not there any more to hold its own."""


class ServiceExchange:
    """An :class:`Exchange` with a service, embedded or elsewhere.

    Construction looks at the service once (for at most about ``config.connect_timeout``) and starts nothing;
    the first :meth:`open` starts the background, and with it an embedded service. In a child that was forked
    after that all methods do nothing: the session is the parent's.

    Args:
        config: where the service is and how it is spoken to.

    Raises:
        ExchangeError: the service refuses this trainer for good (wrong token, wrong protocol version, TLS on
            one side only), or an embedded one is not installed.
        ValueError: a token or TLS file cannot be read, or the history cannot be written.
    """

    def __init__(self, config: ServiceConfig) -> None:
        self._config = config
        self._epochs: dict[str, int] = {}
        reachable = True
        if config.embedded:
            check_installed()
        else:
            status = preflight(config)
            reachable = status is not None
            self._epochs = {} if status is None else {job.job: job.epoch for job in status.jobs}
        self.history: TrainerHistory | None = None
        if config.history_file is not None:
            recorder = HistoryRecorder(config.history_file, "trainer", config.history_matrices)
            self.history = TrainerHistory(recorder)
        self._mailbox = Mailbox(config.outbox_bytes, config.credit_bytes, self.history)
        self._background: _Background | None = None
        self._warned = not reachable
        self._closed = False
        self._owner: int | None = None

    def newest_epoch(self, job: str) -> int:
        """The largest epoch of a job that the service knew of at construction; 0 if it knew of none."""
        return self._epochs.get(job, 0)

    @property
    def credit_bytes(self) -> int:
        """What the service may have sent without receipt."""
        return self._config.credit_bytes

    @property
    def generation(self) -> int:
        """See :class:`Exchange`."""
        return self._mailbox.generation

    def open(self, session: SessionSpec) -> None:
        """See :class:`Exchange`.

        Raises:
            ValueError: the session contradicts the protocol; the message names field and value.
        """
        if self._closed:
            raise RuntimeError("the exchange is closed")
        if self._foreign():
            return
        self._mailbox.open(session)
        if self._background is None:
            self._owner = os.getpid()
            endpoint: Endpoint = (
                EmbeddedEndpoint(self._config) if self._config.embedded else FixedEndpoint(self._config)
            )
            supervisor = Supervisor(self._config, self._mailbox, endpoint, self._warned)
            self._background = _Background(self._mailbox, supervisor, self._config.close_timeout)
            # A collected exchange ends its background, which does not refer to it.
            weakref.finalize(self, self._background.leave).atexit = False
            self._background.start()
        else:
            self._background.supervisor.interrupt(self._config.close_timeout / 2)

    def offer(self, snapshots: Sequence[Snapshot], step: int) -> None:
        """See :class:`Exchange`."""
        if not self._foreign():
            self._mailbox.offer(snapshots)

    def collect(self, step: int) -> list[Arrival | Rejection]:
        """See :class:`Exchange`."""
        return [] if self._foreign() else self._mailbox.collect()

    def wait(self, timeout: float) -> bool:
        """See :class:`Exchange`."""
        return not self._foreign() and self._mailbox.wait(timeout)

    def counters(self) -> dict[str, int]:
        """See :class:`Exchange`."""
        return Mailbox().counters() if self._foreign() else self._mailbox.counters()

    def close(self) -> None:
        """See :class:`Exchange`."""
        self._closed = True
        if self._background is not None:
            self._background.close()
        if self.history is not None:
            self.history.close()

    def _foreign(self) -> bool:
        """Whether this is a forked child of the process that runs the background."""
        # Looked at before any lock: a lock may have been held by another thread when the fork happened.
        return self._owner is not None and self._owner != os.getpid()


class _Background:
    """Owns the thread, apart from the exchange, so that it can outlive it for as long as ending takes."""

    def __init__(self, mailbox: Mailbox, supervisor: Supervisor, close_timeout: float) -> None:
        self.supervisor = supervisor
        self._mailbox = mailbox
        self._close_timeout = close_timeout
        self._owner = os.getpid()

    def start(self) -> None:
        """Begin, and be ended at the interpreter's exit if nobody did before."""
        _live.add(self)
        self.supervisor.start(lambda: _live.discard(self))

    def leave(self) -> None:
        """Let everything end by itself. For finalizers, which may run anywhere: no wait, no new thread."""
        if self._owner == os.getpid():
            self._mailbox.stop()

    def close(self) -> None:
        """End everything, waiting for it within bounds."""
        if self._owner != os.getpid():
            return
        self.leave()
        self.supervisor.interrupt_unary()
        # No timer cuts the stream here: at interpreter exit no thread can be started any more.
        if not self.supervisor.join(self._close_timeout / 2):
            self.supervisor.interrupt(0)
            if not self.supervisor.join(self._close_timeout / 2 + _SERVICE_END_SECONDS):
                logger.warning("the background thread of the preconditioner service does not end")


@atexit.register
def _close_all() -> None:
    live = list(_live)
    for background in live:
        background.leave()
    for background in live:
        background.close()
