"""The background thread that connects, opens sessions, runs streams, and begins again when they break."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import TypeAlias

import grpc

from preconditioner_client.announcement import check_opened
from preconditioner_client.connection import (
    Failure,
    Metadata,
    Outcome,
    call_metadata,
    explain,
    open_channel,
    stub,
    warn_in_vain,
    warn_unreachable,
)
from preconditioner_client.endpoint import Endpoint
from preconditioner_client.exchange import ExchangeError
from preconditioner_client.mailbox import Mailbox
from preconditioner_client.order import Order
from preconditioner_client.service_config import ServiceConfig
from preconditioner_client.stream import Stream
from preconditioner_protos import MAX_MESSAGE_BYTES
from preconditioner_protos.v1 import preconditioner_pb2 as pb
from preconditioner_protos.v1 import preconditioner_pb2_grpc as rpc

logger = logging.getLogger("preconditioner_client")

_LARGEST_MESSAGE = 64 * 1024 * 1024  # more than that no service may make us receive at once
_LOCATE_SECONDS = 0.5
_TOKEN_POLL_SECONDS = 1.0

_Place: TypeAlias = "tuple[str, str | None] | None"
"""Address and token."""
_CLOSE_SESSION_SECONDS = 1.0
_STEADY_SECONDS = 5.0


class Backoff:
    """Exponentially growing pauses with jitter, so that many trainers do not come back at one moment."""

    def __init__(self, first: float = 0.1, longest: float = 5.0) -> None:
        self._first = self._next = first
        self._longest = longest

    def pause(self) -> float:
        """Seconds to pause now; the next answer is about twice as long."""
        pause, self._next = self._next, min(2 * self._next, self._longest)
        return pause * random.uniform(0.5, 1.0)

    def reset(self) -> None:
        """All is well: begin with the shortest again."""
        self._next = self._first


class Supervisor:
    """Serves one session after the other until the mailbox is stopped.

    Args:
        config: how the service is spoken to.
        mailbox: shared with the training thread.
        endpoint: where the service is; released at the end.
        warned: the user was already told that the service is not there.
    """

    REFUSED_PAUSE = 30.0
    """Seconds between attempts after a refusal that only a person, or a rotated token, can lift."""

    def __init__(
        self, config: ServiceConfig, mailbox: Mailbox, endpoint: Endpoint, warned: bool = False
    ) -> None:
        self._config = config
        self._mailbox = mailbox
        self._endpoint = endpoint
        self._warned = warned
        self._active: Stream | grpc.Future | None = None
        self._opened: pb.OpenSessionResponse | None = None
        self._opened_at = ""
        self._attached_at: float | None = None
        self._logged: set[str] = set()
        self._explained = False
        self._thread = threading.Thread(target=self._run, name="preconditioner-exchange", daemon=True)
        self._on_end: Callable[[], None] = lambda: None

    def start(self, on_end: Callable[[], None]) -> None:
        """Begin, in a thread of its own, which calls ``on_end`` as its last deed."""
        self._on_end = on_end
        self._thread.start()

    def interrupt(self, grace: float) -> None:
        """Let go of what is under way: a stream gets ``grace`` seconds to end in order."""
        active = self._active
        if isinstance(active, Stream):
            active.retire(grace)
        else:
            self.interrupt_unary()

    def interrupt_unary(self) -> None:
        """Let go of what is under way unless it is a stream, which ends by itself in good times."""
        active = self._active
        if active is not None and not isinstance(active, Stream):
            active.cancel()

    def join(self, timeout: float) -> bool:
        """Wait for the thread's end; False if it did not come within ``timeout`` seconds."""
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        served: Order | None = None
        try:
            while True:
                self._mailbox.await_change(served)
                order = self._mailbox.order
                if order is None:
                    return
                self._serve(order)
                served = order
        finally:
            if self._mailbox.in_vain and not self._explained:
                warn_in_vain(self._mailbox.counters()["connections"] > 0)
            self._endpoint.release()
            self._on_end()

    def _serve(self, order: Order) -> None:
        """Keep one session going until it is replaced, stopped or superseded."""
        self._opened = None
        self._logged.clear()
        backoff = Backoff()
        while self._mailbox.order is order:
            self._attached_at = None
            place: _Place = None
            try:
                place = self._endpoint.locate(_LOCATE_SECONDS)
                if place is None:
                    continue
                failure = self._attempt(order, *place)
                if failure.outcome is Outcome.REFUSED and self._token_replaced(place):
                    logger.info(
                        "the token was replaced; the preconditioner service is asked with the new one"
                    )
                    continue
            except (ExchangeError, ValueError) as error:
                failure = Failure(Outcome.REFUSED, str(error))
            except Exception:
                # A bug must not end the thread: the training would never see a version again.
                logger.exception("unexpected error while speaking to the preconditioner service")
                failure = Failure(Outcome.RETRY, "unexpected error")
            if self._mailbox.order is not order:
                return
            if self._attached_at is not None and time.monotonic() - self._attached_at > _STEADY_SECONDS:
                backoff.reset()
            if not self._judge(order, failure):
                return
            if failure.outcome is Outcome.REFUSED:
                self._pause_refused(order, place)
            else:
                self._mailbox.await_change(order, backoff.pause())

    def _pause_refused(self, order: Order, used: _Place) -> None:
        """Pause after a refusal, for as long as the token stays the same."""
        until = time.monotonic() + self.REFUSED_PAUSE
        while self._mailbox.order is order and (left := until - time.monotonic()) > 0:
            self._mailbox.await_change(order, min(left, _TOKEN_POLL_SECONDS))
            if self._token_replaced(used):
                return

    def _token_replaced(self, used: _Place) -> bool:
        """Whether there is another token now than the one that was used."""
        try:
            now = self._endpoint.locate(_LOCATE_SECONDS)
        except (ExchangeError, ValueError):
            return False
        return now is not None and (used is None or now[1] != used[1])

    def _judge(self, order: Order, failure: Failure) -> bool:
        """Tell whoever must know of a failure; False if the session is over for good."""
        if failure.outcome is Outcome.RETRY:
            if not self._warned:
                self._warned = True
                warn_unreachable(failure.message)
            return True
        if failure.outcome is Outcome.REOPEN:
            logger.info("%s; it is opened again", failure.message)
            self._opened = None
            return True
        if failure.message not in self._logged:
            self._logged.add(failure.message)
            if not self._mailbox.fail(order, failure.message):
                logger.error("%s", failure.message)
                self._explained = True
        if failure.outcome is Outcome.REFUSED:
            self._opened = None
            return True
        return False

    def _attempt(self, order: Order, address: str, token: str | None) -> Failure:
        """Connect, open the session unless it still lives, attach, and run the stream to its end."""
        if address != self._opened_at:
            self._opened, self._opened_at = None, address
        headers = call_metadata(token)
        with open_channel(self._config, address) as channel:
            calls = stub(channel)
            try:
                if self._opened is None:
                    opened = self._open(calls, order.request, headers)
                    check_opened(opened, address)
                    self._opened = opened
                failure = self._stream(order, self._opened, channel, address, headers)
            except grpc.RpcError as error:
                failure = explain(error, address, job=order.spec.job)
            if self._opened is not None and self._mailbox.order is not order:
                self._close_session(calls, headers)
            return failure

    def _open(
        self, calls: rpc.PreconditionerServiceStub, request: pb.OpenSessionRequest, headers: Metadata
    ) -> pb.OpenSessionResponse:
        call = calls.OpenSession.future(request, timeout=self._config.connect_timeout, metadata=headers)
        self._active = call
        try:
            result: pb.OpenSessionResponse = call.result()
        except grpc.FutureCancelledError:
            raise ExchangeError("closed while the session was being opened") from None
        finally:
            self._active = None
        return result

    def _stream(
        self,
        order: Order,
        opened: pb.OpenSessionResponse,
        channel: grpc.Channel,
        address: str,
        headers: Metadata,
    ) -> Failure:
        front = opened.placement.fronts[0].address if opened.placement.fronts else ""
        limit = min(opened.limits.max_message_bytes or MAX_MESSAGE_BYTES, _LARGEST_MESSAGE)
        if front or limit > MAX_MESSAGE_BYTES:
            with open_channel(self._config, front or address, limit) as data:
                return self._run_stream(order, opened, data, front or address, headers)
        return self._run_stream(order, opened, channel, address, headers)

    def _run_stream(
        self,
        order: Order,
        opened: pb.OpenSessionResponse,
        channel: grpc.Channel,
        address: str,
        headers: Metadata,
    ) -> Failure:
        lane = self._mailbox.begin(order)
        if lane is None:
            return Failure(Outcome.RETRY, "the session was replaced")
        stream = Stream(self._mailbox, lane, order, opened, self._config.credit_bytes)
        self._active = stream
        try:
            error = stream.run(channel, headers, self._config.connect_timeout, on_attached=self._attached)
        finally:
            self._active = None
        if error is None:
            return Failure(Outcome.RETRY, f"the preconditioner service at {address} ended the stream")
        return explain(error, address, job=order.spec.job, attaching=True)

    def _attached(self) -> None:
        logger.info("connected to the preconditioner service at %s", self._opened_at)
        self._attached_at = time.monotonic()
        self._warned = False
        self._logged.clear()

    def _close_session(self, calls: rpc.PreconditionerServiceStub, headers: Metadata) -> None:
        assert self._opened is not None
        request = pb.CloseSessionRequest(session_id=self._opened.session_id)
        self._opened = None
        try:
            calls.CloseSession(request, timeout=_CLOSE_SESSION_SECONDS, metadata=headers)
        except grpc.RpcError as error:
            logger.debug("CloseSession: %s", error)  # the service frees the session after its ttl
