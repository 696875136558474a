"""What the training thread and the background threads share: one lock, never held over I/O or heavy work."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from preconditioner_client.exchange import Arrival, ExchangeError, Rejection, SessionSpec, Snapshot
from preconditioner_client.inbox import Inbox
from preconditioner_client.order import Lane, Order
from preconditioner_client.outbox import Key, Outbox
from preconditioner_client.recording import SessionHistory, TrainerHistory

_COUNTERS = (
    "bytes_sent",
    "bytes_received",
    "snapshots_sent",
    "snapshots_replaced",
    "received",
    "dropped",
    "nacks",
    "connections",
)
_RECEIPT_SECONDS = 0.01


class Mailbox:
    """Outbox, inbox, counters and news between the training thread and the background.

    Args:
        outbox_bytes: bound of the snapshots that wait, see :class:`Outbox`.
        credit_bytes: preconditioners that the service may have without receipt.
        history: what happens is recorded there.
    """

    def __init__(
        self,
        outbox_bytes: int | None = None,
        credit_bytes: int = 64 * 1024 * 1024,
        history: TrainerHistory | None = None,
    ) -> None:
        # Reentrant, since a garbage collection inside may run a finalizer that comes back to it.
        self._lock = threading.RLock()
        self._work = threading.Condition(self._lock)
        self._activity = threading.Condition(self._lock)
        self._outbox_bytes = outbox_bytes
        self._credit_bytes = credit_bytes
        self._history = history
        self._log: SessionHistory | None = None
        self._order: Order | None = None
        self._lane: Lane | None = None
        self._outbox = Outbox(())
        self._inbox = Inbox()
        self._totals = dict.fromkeys(_COUNTERS, 0)
        self._generation = 0
        self._seen_generation = 0
        # Where every snapshot counts (more than one of a block under way), they must reach a new stream in
        # order. So nothing is sent on it until the trainer has seen the generation and offers all again.
        self._reoffer_due = False
        self._session_id = ""
        self._failure: str | None = None
        self._failed = False
        self._stopped = False
        self._taken = False

    # -- the training thread -------------------------------------------------------------------------

    @property
    def generation(self) -> int:
        """Number of successful attaches."""
        if self._seen_generation != self._generation or self._reoffer_due:
            with self._lock:
                self._seen_generation = self._generation
                if self._reoffer_due:
                    self._reoffer_due = False
                    self._outbox.forget_waiting()
                    self._work.notify_all()
        return self._seen_generation

    def open(self, spec: SessionSpec) -> None:
        """Ask for a session; everything of the one before is dropped.

        Raises:
            ManifestError: the session contradicts the protocol.
        """
        order = Order.of(spec, self._history)
        with self._lock:
            self._settle()
            self._leave()
            self._order = order
            self._log = order.log
            self._session_id = ""
            self._reoffer_due = False
            self._failure = None
            self._failed = False
            self._outbox = Outbox(order.block_bytes, spec.snapshots_in_flight, self._outbox_bytes)
            self._inbox = Inbox(spec.snapshots_in_flight)
            self._work.notify_all()

    def offer(self, snapshots: Sequence[Snapshot]) -> None:
        """Queue snapshots."""
        if not snapshots:
            return
        with self._lock:
            for snapshot in snapshots:
                for lost in self._outbox.put(snapshot):
                    detail = f"the outbox is bounded to {self._outbox_bytes} bytes"
                    rejection = Rejection(lost.block, lost.step, "OUTBOX_FULL", detail)
                    self._inbox.reject(rejection)
                    if self._log is not None:
                        self._log.nacked(rejection, on_arrival=False)
            if self._log is not None and self._log.held_is_due():
                self._record_held(self._log)
            self._work.notify_all()

    def collect(self) -> list[Arrival | Rejection]:
        """Take what arrived.

        Raises:
            ExchangeError: see :meth:`Exchange.collect`.
        """
        if self._failure is None and not self._inbox:
            return []  # the usual case needs no lock: a single read of each is atomic
        with self._lock:
            if self._failure is not None:
                failure, self._failure = self._failure, None
                raise ExchangeError(failure)
            items = self._inbox.collect()
            self._taken = self._taken or any(isinstance(item, Arrival) for item in items)
            return items

    def wait(self, timeout: float) -> bool:
        """Block until there is something to collect or a new generation, or ``timeout`` seconds passed."""
        with self._lock:
            happened = self._activity.wait_for(
                lambda: (
                    len(self._inbox) > 0
                    or self._failure is not None
                    or self._generation != self._seen_generation
                    or self._stopped
                ),
                timeout,
            )
            self._seen_generation = self._generation
            return happened and not self._stopped

    def counters(self) -> dict[str, int]:
        """Totals since construction, and ``connected``."""
        with self._lock:
            totals = dict(self._totals)
            totals["snapshots_replaced"] += self._outbox.replaced
            totals["dropped"] += self._inbox.superseded
            totals["connected"] = int(self._lane is not None and self._lane.attached)
            return totals

    def stop(self) -> None:
        """Nothing goes on any more; every waiting thread returns."""
        with self._lock:
            self._stopped = True
            self._leave()
            self._work.notify_all()
            self._activity.notify_all()

    # -- the supervisor ------------------------------------------------------------------------------

    @property
    def order(self) -> Order | None:
        """The session asked for; None once stopped."""
        return None if self._stopped else self._order

    @property
    def in_vain(self) -> bool:
        """Whether a session was asked for, no preconditioner was ever taken, and no error said why."""
        asked = self._order is not None and bool(self._order.spec.blocks)
        return asked and not self._taken and not self._failed

    def await_change(self, order: Order | None, timeout: float | None = None) -> None:
        """Block until another session than ``order`` is asked for, all is stopped, or ``timeout``."""
        with self._lock:
            self._work.wait_for(lambda: self._stopped or self._order is not order, timeout)

    def fail(self, order: Order, message: str) -> bool:
        """The service refuses; the next ``collect`` raises, once, unless some session was opened before.

        Returns:
            False if nothing will be raised.
        """
        with self._lock:
            if self._generation or self._failed or self._order is not order:
                return False
            self._failure = message
            self._failed = True
            self._activity.notify_all()
            return True

    def begin(self, order: Order) -> Lane | None:
        """Name a new stream of the session; None if the session is out of date."""
        with self._lock:
            if self._stopped or self._order is not order:
                return None
            self._lane = Lane()
            return self._lane

    def attached(self, lane: Lane, session_id: str, credit_bytes: int) -> None:
        """The stream stands: from now on snapshots are sent."""
        with self._lock:
            if self._lane is not lane or lane.attached:
                return
            lane.attached = True
            self._outbox.begin_stream(credit_bytes, same_session=session_id == self._session_id)
            self._session_id = session_id
            self._reoffer_due = self._order is not None and self._order.spec.snapshots_in_flight > 1
            self._generation += 1
            self._totals["connections"] += 1
            if self._log is not None:
                self._log.attached(True)
            self._work.notify_all()
            self._activity.notify_all()

    def end(self, lane: Lane) -> None:
        """The stream is over; what was not sent is kept."""
        with self._lock:
            if self._lane is lane:
                self._leave()
            self._work.notify_all()

    # -- the sending thread --------------------------------------------------------------------------

    def await_work(self, lane: Lane) -> bool:
        """Block until there is something to send; False when the stream is to be half-closed."""
        with self._lock:
            self._work.wait_for(lambda: self._is_urgent(lane) or (lane.attached and bool(lane.receipts)))
            if not self._is_urgent(lane):
                # Receipts alone can wait a moment for others: a message costs as much as a hundred of them.
                self._work.wait_for(lambda: self._is_urgent(lane), _RECEIPT_SECONDS)
            return self._lane is lane

    def take_snapshot(self, lane: Lane) -> Snapshot | None:
        """The next snapshot to send, if credit allows one; counted as sent."""
        with self._lock:
            if self._lane is not lane or not self._may_send(lane):
                return None
            snapshot = self._outbox.take()
            if snapshot is not None and self._order is not None:
                self._totals["snapshots_sent"] += 1
                self._totals["bytes_sent"] += self._order.block_bytes[snapshot.block]
            return snapshot

    def take_receipts(self, lane: Lane) -> list[Key]:
        """Receipts to send."""
        with self._lock:
            receipts, lane.receipts, lane.receipt_bytes = lane.receipts, [], 0
            return receipts

    # -- the reading thread --------------------------------------------------------------------------

    def drain(self, lane: Lane) -> None:
        """Send no new snapshots on this stream."""
        with self._lock:
            lane.draining = True

    def is_new(self, lane: Lane, block: int, step: int) -> bool:
        """Whether a preconditioner would be delivered; spares the unpacking of one that would not."""
        with self._lock:
            return self._lane is lane and self._inbox.is_new(block, step)

    def deliver(self, lane: Lane, arrival: Arrival, packed_bytes: int) -> None:
        """A preconditioner arrived whole and sound; its receipt is due."""
        with self._lock:
            if self._lane is not lane:
                return
            is_new = self._inbox.deliver(arrival)
            if is_new:
                self._totals["received"] += 1
                self._totals["bytes_received"] += packed_bytes
                self._activity.notify_all()
            else:
                self._totals["dropped"] += 1
            if self._log is not None:
                if is_new:
                    self._log.received(arrival)
                else:
                    self._log.dropped(arrival.block, arrival.step, "OUTDATED")
            self._acknowledge(lane, arrival.block, arrival.step)

    def drop(self, lane: Lane, block: int, step: int, rejection: Rejection | None = None) -> None:
        """A preconditioner was no good; its receipt is due all the same, or its credit would be lost."""
        with self._lock:
            if self._lane is not lane:
                return
            self._totals["dropped"] += 1
            if self._log is not None:
                reason = "OUTDATED" if rejection is None else rejection.reason
                self._log.dropped(block, step, reason)
            self._acknowledge(lane, block, step)
            if rejection is not None and self._inbox.is_new(block, step):
                self._inbox.reject(rejection)
                self._activity.notify_all()

    def answered(self, lane: Lane, keys: Sequence[Key]) -> None:
        """Snapshots were acknowledged."""
        with self._lock:
            if self._lane is not lane:
                return
            for block, step in keys:
                self._outbox.acknowledged(block, step)
            if self._log is not None:
                self._log.acknowledged(keys)
            self._work.notify_all()

    def refused(self, lane: Lane, rejection: Rejection, on_arrival: bool) -> None:
        """A snapshot was refused, on arrival or later."""
        with self._lock:
            if self._lane is not lane:
                return
            self._totals["nacks"] += 1
            if self._log is not None:
                self._log.nacked(rejection, on_arrival)
            if on_arrival:
                self._work.notify_all()
                if self._outbox.refused(rejection.block, rejection.step, rejection.reason == "OUTDATED"):
                    return  # the service has it
            self._inbox.reject(rejection)
            self._activity.notify_all()

    # ------------------------------------------------------------------------------------------------

    def _leave(self) -> None:
        if self._log is not None and self._lane is not None and self._lane.attached:
            self._log.attached(False)
        self._lane = None

    def _is_urgent(self, lane: Lane) -> bool:
        """Whether the sending thread has something better to do than to wait for more receipts."""
        if self._lane is not lane:
            return True
        if not lane.attached:
            return False
        sendable = self._may_send(lane) and self._outbox.sendable()
        return sendable or 4 * lane.receipt_bytes >= self._credit_bytes

    def _may_send(self, lane: Lane) -> bool:
        return not lane.draining and not self._reoffer_due

    def _acknowledge(self, lane: Lane, block: int, step: int) -> None:
        lane.receipts.append((block, step))
        if self._order is not None:
            lane.receipt_bytes += self._order.block_bytes[block]
        if len(lane.receipts) == 1 or 4 * lane.receipt_bytes >= self._credit_bytes:
            self._work.notify_all()

    def _record_held(self, log: SessionHistory) -> None:
        assert self._order is not None  # it has the log
        sizes = self._order.block_bytes
        each = self._order.spec.snapshots_in_flight * sum(sizes)
        log.held(
            waiting=self._outbox.waiting_bytes,
            waiting_budget=each if self._outbox_bytes is None else min(each, self._outbox_bytes),
            unanswered=self._outbox.unanswered_bytes,
            unanswered_budget=max(self._outbox.credit_bytes, max(sizes, default=0)),
            inbox=sum(sizes[block] for block in self._inbox.arrived()),
            inbox_budget=each,
        )

    def _settle(self) -> None:
        """Carry what outbox and inbox counted over to the totals, before they are replaced."""
        self._totals["snapshots_replaced"] += self._outbox.replaced
        self._totals["dropped"] += self._inbox.superseded
