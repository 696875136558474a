"""One Exchange stream: reads snapshots, pushes preconditioners, both at all times.

What may pile up is bounded without trusting the trainer: whole snapshots go to the board, where the newest
win; preconditioners stay on the board until there is credit; and answers that the trainer does not read stop
the reading of its snapshots at :data:`_MOST_ANSWERS`. A trainer that reads, as it must, never meets that.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

import grpc
import grpc.aio

from preconditioner_protos import MAX_ENTRIES, Assembler, PackedBlock, Refusal, chunk_messages
from preconditioner_protos.v1 import preconditioner_pb2 as pb
from preconditioner_service.calls import Context, EndOfStream
from preconditioner_service.decoding import decode_trainer_message, may_hold_many
from preconditioner_service.dispatcher import Dispatcher
from preconditioner_service.logs import limited
from preconditioner_service.sessions import Session

_MOST_ANSWERS = 4096
"""Receipts and Nacks that wait to be written."""

_MOST_SENT = 16384
"""Preconditioners without a receipt: tiny ones would never use up the credit of bytes."""

_RECEIPT_BYTES, _NACK_BYTES = 32, 2304
"""The largest that one of them can be in a message."""

_CHUNKS_AT_A_TIME = 64
"""After as many, other streams have their turn: a message may hold thousands of tiny ones."""

_TINY_BYTES = 1024
"""Mean size of a message's chunks below which handling them costs far more than sending them."""

_TINY_PAUSE = 0.004
"""Seconds between two slices of such: a flood of them leaves the processor to others for most of the time."""

_LAST_WORDS = 5.0
"""Seconds to write the last answers after the trainer half-closed its stream."""

_MOST_DETAIL = 500
"""Characters of a Nack's text."""


class Turns:
    """One for all streams: only one of them at a time works through a message of many small chunks.

    However many streams bring such messages, a stream with an ordinary one waits for one slice of theirs.
    """

    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    async def take(self, pause: float = 0.0) -> None:
        """Wait for the caller's turn to work for about a millisecond, and let the others' events in.

        Args:
            pause: seconds in which no stream works through such messages.
        """
        async with self._lock:
            await asyncio.sleep(pause)


class ExchangeStream:
    """The service's end of one attached stream. It is the board's ``Stream`` of its session.

    Args:
        session: what it is attached to.
        context: gRPC's; Attach was read from it and Attached written.
        credit_bytes: packed preconditioners that may be unanswered.
        max_message_bytes: of one message.
        idle_timeout: seconds without a message after which the stream ends.
        turns: those of all streams.
        dispatcher: told of every accepted snapshot.
    """

    def __init__(
        self,
        session: Session,
        context: Context,
        dispatcher: Dispatcher,
        *,
        credit_bytes: int,
        max_message_bytes: int,
        idle_timeout: float,
        turns: Turns,
    ) -> None:
        self._session = session
        self._context = context
        self._dispatcher = dispatcher
        self._credit_bytes = credit_bytes
        self._max_message_bytes = max_message_bytes
        self._idle_timeout = idle_timeout
        self._turns = turns
        self._assembler = Assembler(session.statistics)
        self._receipts: list[pb.Receipt] = []
        self._nacks: list[pb.Nack] = []
        self._drain: pb.Drain | None = None
        self._saying = False
        self._sent: dict[tuple[int, int], int] = {}
        self._sent_bytes = 0
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._end: asyncio.Future[EndOfStream] = asyncio.get_running_loop().create_future()

    # The board's side, and the service's.

    def wake(self) -> None:
        """There is something to push."""
        self._wake.set()

    def nack(self, nack: pb.Nack) -> None:
        """Send this Nack, its text cut to what is sensible."""
        nack.detail = nack.detail[:_MOST_DETAIL]
        self._nacks.append(nack)
        self._wake.set()

    def drain(self, grace_seconds: float) -> None:
        """Tell the trainer that the service is going to stop."""
        self._drain = pb.Drain(grace_seconds=grace_seconds)
        self._wake.set()

    def end(self, why: str) -> None:
        """End with ABORTED: superseded."""
        self.end_with(grpc.StatusCode.ABORTED, why)

    def end_with(self, code: grpc.StatusCode, details: str) -> None:
        """End with this status; the first call counts."""
        if not self._end.done():
            self._end.set_result(EndOfStream(code, details))

    @property
    def job(self) -> str:
        """Name of the session's job."""
        return self._session.job.name

    @property
    def unanswered(self) -> int:
        """Preconditioners that were sent and not receipted."""
        return len(self._sent)

    @property
    def unsaid(self) -> bool:
        """Whether answers wait to be written, or are being written."""
        return bool(self._saying or self._receipts or self._nacks or self._drain)

    # The stream.

    async def run(self) -> None:
        """Read and write until the trainer half-closes its side.

        Raises:
            EndOfStream: the service ends it.
            grpc.RpcError, asyncio.CancelledError: the connection broke.
        """
        reading = asyncio.create_task(self._read())
        writing = asyncio.create_task(self._write())
        events: set[asyncio.Future[Any]] = {reading, writing, self._end}
        try:
            await asyncio.wait(events, return_when=asyncio.FIRST_COMPLETED)
            if self._end.done():
                raise self._end.result()
            if writing.done():
                await writing  # it ends by an error only
            await reading
            # Half-closed. Whoever is interrupted in a write must not be followed by another, so the writer
            # itself says the last words.
            try:
                await asyncio.wait_for(self._quiet(writing), _LAST_WORDS)
            except asyncio.TimeoutError:
                raise EndOfStream(
                    grpc.StatusCode.UNAVAILABLE, f"answers were not read for {_LAST_WORDS:g} s"
                ) from None
        finally:
            for task in (reading, writing):
                task.cancel()
            await asyncio.gather(reading, writing, return_exceptions=True)

    async def _quiet(self, writing: asyncio.Task[None]) -> None:
        while self.unsaid and not writing.done():
            self._room.clear()
            self._wake.set()
            await self._room.wait()

    async def _read(self) -> None:
        while (data := await self._next()) is not grpc.aio.EOF:
            if may_hold_many(data):
                await self._turns.take()
            message = decode_trainer_message(data)
            kind = message.WhichOneof("kind")
            if kind == "chunks":
                count = len(message.chunks.chunks)
                await self._take(message.chunks, _TINY_PAUSE if len(data) < count * _TINY_BYTES else 0.0)
            elif kind == "receipts":
                for receipt in message.receipts.receipts:
                    self._receipted(receipt.block, receipt.step)
            elif kind == "attach":
                raise EndOfStream(grpc.StatusCode.INVALID_ARGUMENT, "attach: a second one on this stream")
            # Other kinds are a later revision's of the protocol, which promises that ignoring them is right.
            del data, message  # what was read must not be held while the next is awaited

    async def _next(self) -> Any:
        try:
            return await asyncio.wait_for(self._context.read(), self._idle_timeout)
        except asyncio.TimeoutError:
            raise EndOfStream(
                grpc.StatusCode.UNAVAILABLE,
                f"no message for {self._idle_timeout:g} s (stream_idle_timeout); attach again",
            ) from None

    async def _take(self, chunks: pb.Chunks, pause: float) -> None:
        for number, chunk in enumerate(chunks.chunks):
            if number and number % _CHUNKS_AT_A_TIME == 0:
                self._dispatcher.kick()
                await self._turns.take(pause)
                await self._answers_read()
            if self._session.closed:
                return
            for outcome in self._assembler.add(chunk):
                self._arrived(outcome)
        # Once a message, so that its small blocks can share a batch.
        self._dispatcher.kick()
        await self._answers_read()

    async def _answers_read(self) -> None:
        while len(self._receipts) + len(self._nacks) > _MOST_ANSWERS:
            self._room.clear()
            await self._room.wait()

    def _arrived(self, outcome: PackedBlock | Refusal) -> None:
        session = self._session
        if isinstance(outcome, Refusal):
            self._refuse(outcome.block, outcome.step, outcome.reason, outcome.detail)
        elif session.accept(outcome):
            self._receipts.append(pb.Receipt(block=outcome.block, step=outcome.step))
            self._wake.set()
            self._dispatcher.enqueue(session, outcome.block)
        else:
            newest = session.blocks[outcome.block].newest
            detail = f"step {outcome.step} is not newer than step {newest}"
            self._refuse(outcome.block, outcome.step, pb.NACK_REASON_OUTDATED, detail)

    def _refuse(self, block: int, step: int, reason: pb.NackReason, detail: str) -> None:
        session = self._session
        session.job.counters.nacks += 1
        session.refused(block, step, reason)
        # A trainer that has come back offers what was accepted before: that is no event for an operator.
        level = logging.DEBUG if reason == pb.NACK_REASON_OUTDATED else logging.WARNING
        limited(
            level,
            "nack",
            (session.id, reason),
            job=session.job.name,
            rank=session.rank,
            epoch=session.epoch,
            block=block,
            step=step,
            reason=pb.NackReason.Name(reason),
            detail=detail,
        )
        self.nack(pb.Nack(block=block, step=step, reason=reason, detail=detail, on_arrival=True))

    def _receipted(self, block: int, step: int) -> None:
        nbytes = self._sent.pop((block, step), None)
        if nbytes is None:
            return  # never sent here, or receipted before: gives no credit
        self._sent_bytes -= nbytes
        self._session.receipt(block, step)
        self._wake.set()

    async def _write(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            await self._say()
            for message in chunk_messages(self._pushes(), self._max_message_bytes, message=pb.ServiceMessage):
                await self._context.write(message)
                await self._say()

    async def _say(self) -> None:
        """Write answers, which need no credit."""
        self._saying = True
        while self._receipts or self._nacks or self._drain:
            if self._drain is not None:
                drain, self._drain = self._drain, None
                await self._context.write(pb.ServiceMessage(drain=drain))
            if self._receipts:
                many = min(self._max_message_bytes // _RECEIPT_BYTES, MAX_ENTRIES)
                receipts, self._receipts = self._receipts[:many], self._receipts[many:]
                await self._context.write(pb.ServiceMessage(receipts=pb.Receipts(receipts=receipts)))
            if self._nacks:
                many = min(self._max_message_bytes // _NACK_BYTES, MAX_ENTRIES)
                nacks, self._nacks = self._nacks[:many], self._nacks[many:]
                await self._context.write(pb.ServiceMessage(nacks=pb.Nacks(nacks=nacks)))
        self._saying = False
        self._room.set()

    def _pushes(self) -> Iterator[PackedBlock]:
        """Preconditioners while there is credit, each taken from the board when its turn has come."""
        session = self._session
        while not session.closed and session.stream is self and (item := session.next_unsent()) is not None:
            full = len(self._sent) >= _MOST_SENT or self._sent_bytes + item.nbytes > self._credit_bytes
            if self._sent and full:
                return  # a receipt wakes the writer
            session.take_unsent()
            self._sent[item.block, item.step] = item.nbytes
            self._sent_bytes += item.nbytes
            yield item
