"""One ``Exchange`` stream: snapshots up, preconditioners down, receipts both ways.

Two threads work for it: gRPC's own, which draws the requests and stands still while the service does not
read (HTTP/2 flow control), and the supervisor's, which reads. They share nothing but the mailbox.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import torch

from preconditioner_client.connection import Metadata, stub
from preconditioner_client.exchange import Rejection, Snapshot
from preconditioner_client.inbox import HOST, NotFiniteError, unpack_arrival
from preconditioner_client.mailbox import Mailbox
from preconditioner_client.order import Lane, Order
from preconditioner_protos import Assembler, Layout, PackedBlock, Refusal, chunk_messages
from preconditioner_protos.v1 import preconditioner_pb2 as pb

logger = logging.getLogger("preconditioner_client")

# Copying a message holds the interpreter's lock, and so the training thread, for about 0.2 ms per MiB and
# copy; smaller messages cost more in all.
_SEND_BYTES = 1024 * 1024
_RECEIPTS_PER_MESSAGE = 4096
_READY_POLL_SECONDS = 0.0005
_DETAIL_CHARACTERS = 500


class Stream:
    """Runs one attach of a session, from ``Attach`` to the end of the call.

    Args:
        mailbox: where everything comes from and goes to.
        lane: this stream's name in the mailbox.
        order: the session.
        opened: the service's answer to it.
        credit_bytes: preconditioner bytes that the service may have without answer.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        lane: Lane,
        order: Order,
        opened: pb.OpenSessionResponse,
        credit_bytes: int,
    ) -> None:
        self._mailbox = mailbox
        self._lane = lane
        self._spec = order.spec
        self._log = order.log
        self._session_id = opened.session_id
        self._limits = opened.limits
        self._credit_bytes = credit_bytes
        self._layout = Layout.of_preconditioners(order.request.manifest)
        self._assembler = Assembler(self._layout)
        self._call: Any = None
        self._retired = threading.Event()

    def run(
        self,
        channel: grpc.Channel,
        metadata: Metadata,
        attach_timeout: float,
        on_attached: Callable[[], None] = lambda: None,
    ) -> grpc.RpcError | None:
        """Attach, then read until the end of the stream.

        Args:
            channel: to the front that serves the session.
            metadata: of the call.
            attach_timeout: seconds until ``Attached`` must have come; after it the call is cancelled.
            on_attached: called when it came.

        Returns:
            The error that ended the stream; None if the service ended it with OK.
        """
        self._call = stub(channel).Exchange(self._requests(), metadata=metadata)
        deadline = _timer(attach_timeout, self._cancel_unattached)
        try:
            if self._retired.is_set():
                self._call.cancel()
            for message in self._call:
                before = self._lane.attached
                self._receive(message)
                if self._lane.attached and not before:
                    on_attached()
        except grpc.RpcError as error:
            return error
        finally:
            deadline.cancel()
            self._mailbox.end(self._lane)
            self._call.cancel()
        return None

    def retire(self, grace: float) -> None:
        """Cut the call ``grace`` seconds from now, if it did not end by half-closing until then."""
        self._retired.set()
        if self._call is None:
            return  # run() looks at the flag before it reads
        if grace <= 0:
            self._call.cancel()
        else:
            _timer(grace, self._call.cancel)

    def _cancel_unattached(self) -> None:
        if not self._lane.attached:
            self._call.cancel()

    # -- up ------------------------------------------------------------------------------------------

    def _requests(self) -> Iterator[pb.TrainerMessage]:
        attach = pb.Attach(
            session_id=self._session_id, epoch=self._spec.epoch, credit_bytes=self._credit_bytes
        )
        yield pb.TrainerMessage(attach=attach)
        limit = min(self._limits.max_message_bytes or _SEND_BYTES, _SEND_BYTES)
        while self._mailbox.await_work(self._lane):
            yield from self._receipts()
            for message in chunk_messages(self._ready_blocks(), limit, message=pb.TrainerMessage):
                yield message
                # Between the messages of a large block too: credit comes back early.
                yield from self._receipts()

    def _receipts(self) -> Iterator[pb.TrainerMessage]:
        keys = self._mailbox.take_receipts(self._lane)
        for start in range(0, len(keys), _RECEIPTS_PER_MESSAGE):
            part = keys[start : start + _RECEIPTS_PER_MESSAGE]
            receipts = pb.Receipts(receipts=[pb.Receipt(block=block, step=step) for block, step in part])
            yield pb.TrainerMessage(receipts=receipts)

    def _ready_blocks(self) -> Iterator[PackedBlock]:
        while (snapshot := self._mailbox.take_snapshot(self._lane)) is not None:
            _await_copy(snapshot)
            if self._log is not None:
                self._log.sent(snapshot)
            sides = tuple(side.numpy().astype("<f4", copy=False) for side in snapshot.sides)
            yield PackedBlock(snapshot.block, snapshot.step, sides)

    # -- down ----------------------------------------------------------------------------------------

    def _receive(self, message: pb.ServiceMessage) -> None:
        kind = message.WhichOneof("kind")
        if kind is None:
            return  # of a later revision of the protocol, which promises that ignoring it is right
        if kind == "attached":
            self._mailbox.attached(self._lane, self._session_id, self._limits.credit_bytes)
        elif not self._lane.attached:
            logger.warning("the preconditioner service sent %s before Attached; the stream is cut", kind)
            self._call.cancel()
        elif kind == "chunks":
            for chunk in message.chunks.chunks:
                for outcome in self._assembler.add(chunk):
                    self._take(outcome)
        elif kind == "receipts":
            self._mailbox.answered(self._lane, [(r.block, r.step) for r in message.receipts.receipts])
        elif kind == "nacks":
            for nack in message.nacks.nacks:
                self._refused(nack)
        elif kind == "drain":
            logger.info("the preconditioner service is going to stop in %g s", message.drain.grace_seconds)
            self._mailbox.drain(self._lane)

    def _take(self, outcome: PackedBlock | Refusal) -> None:
        block, step = outcome.block, outcome.step
        if isinstance(outcome, Refusal):
            if block < len(self._layout):
                rejection = _rejection(block, step, outcome.reason, outcome.detail)
                self._mailbox.drop(self._lane, block, step, rejection)
            else:
                logger.debug("dropped from the preconditioner service: %s", outcome.detail)
            return
        if not self._mailbox.is_new(self._lane, block, step):
            self._mailbox.drop(self._lane, block, step)
            return
        try:
            device = self._spec.devices[block] if self._spec.devices else HOST
            arrival = unpack_arrival(outcome, self._layout.sides[block], device)
        except NotFiniteError as error:
            rejection = _rejection(block, step, pb.NACK_REASON_NOT_FINITE, str(error))
            self._mailbox.drop(self._lane, block, step, rejection)
        else:
            self._mailbox.deliver(self._lane, arrival, outcome.nbytes)

    def _refused(self, nack: pb.Nack) -> None:
        if nack.block >= len(self._layout):
            logger.debug("the preconditioner service refused block %d, which does not exist", nack.block)
            return
        rejection = _rejection(nack.block, nack.step, nack.reason, nack.detail)
        self._mailbox.refused(self._lane, rejection, nack.on_arrival)


def _await_copy(snapshot: Snapshot) -> None:
    """Wait for the copy from the device. Polled, since waiting on a CUDA event would spin on a core."""
    if snapshot.ready is not None:
        while not _is_done(snapshot.ready):
            time.sleep(_READY_POLL_SECONDS)


def _is_done(event: torch.cuda.Event) -> bool:
    # A thread begins on the first device, and would make a context there.
    with torch.cuda.device(event.device):
        return bool(event.query())


def _rejection(block: int, step: int, reason: pb.NackReason, detail: str) -> Rejection:
    try:
        name = pb.NackReason.Name(reason).removeprefix("NACK_REASON_")
    except ValueError:
        name = str(int(reason))  # of a later revision of the protocol
    return Rejection(block, step, name, detail[:_DETAIL_CHARACTERS])


def _timer(seconds: float, action: Any) -> threading.Timer:
    timer = threading.Timer(seconds, action)
    timer.daemon = True
    timer.start()
    return timer
