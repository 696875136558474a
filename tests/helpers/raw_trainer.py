"""A trainer that speaks the protocol with bare stubs and NumPy, and remembers all that it was sent."""

from __future__ import annotations

import itertools
import queue
import threading
import time

import grpc
import numpy as np

from preconditioner_protos import Assembler, Layout, PackedBlock, chunk_messages, pack, unpack
from preconditioner_protos.history import HistoryRecorder, Kind, Scope
from preconditioner_protos.v1 import preconditioner_pb2 as pb
from preconditioner_protos.v1 import preconditioner_pb2_grpc as pb_grpc

TIMEOUT = 60.0


def manifest(
    *blocks: tuple[int, ...],
    order: float = 4.0,
    ridge: float = 1e-6,
    dtype: int = pb.DTYPE_FLOAT32,
    in_flight: int = 0,
) -> pb.Manifest:
    return pb.Manifest(
        blocks=[
            pb.Block(
                name=f"block{index}",
                sides=[pb.Side(length=n, root_order=order) for n in lengths],
                ridge=pb.Ridge(kind=pb.RIDGE_KIND_RELATIVE, value=ridge),
            )
            for index, lengths in enumerate(blocks)
        ],
        statistics_dtype=dtype,
        preconditioner_dtype=dtype,
        snapshots_in_flight=in_flight,
    )


def open_request(job: str, blocks: pb.Manifest, *, epoch: int = 1, **fields) -> pb.OpenSessionRequest:
    defaults = {"protocol_version": 1, "rank": 0, "world_size": 1, "client": "raw_trainer"}
    return pb.OpenSessionRequest(job=job, epoch=epoch, manifest=blocks, **(defaults | fields))


def statistics(n: int, seed: int = 0, dtype=np.float32) -> np.ndarray:
    gradient = np.random.default_rng(seed).standard_normal((n, 2 * n))
    return (gradient @ gradient.T / n).astype(dtype)


def expected_root(matrix: np.ndarray, order: float = 4.0, ridge: float = 1e-6) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix.astype(np.float64))
    values = values + ridge * values.max()
    return (vectors * values ** (-1 / order)) @ vectors.T


class RawTrainer:
    """One session. ``trainer.until(condition)`` waits on what was received.

    With a ``recorder`` its snapshots, receipts and preconditioners stand in a history.
    """

    def __init__(
        self, address: str, token: str, recorder: HistoryRecorder | None = None, **channel_options
    ) -> None:
        self.recorder = recorder
        options = [("grpc.max_receive_message_length", -1), *channel_options.items()]
        self.channel = grpc.insecure_channel(address, options=options)
        self.stub = pb_grpc.PreconditionerServiceStub(self.channel)
        self.metadata = (("authorization", f"Bearer {token}"),)
        self.opened: pb.OpenSessionResponse | None = None
        self.manifest: pb.Manifest | None = None

    # Unary calls.

    def open(self, request: pb.OpenSessionRequest) -> pb.OpenSessionResponse:
        self.opened = self.stub.OpenSession(request, metadata=self.metadata, timeout=TIMEOUT)
        self.job, self.manifest, self.epoch = request.job, request.manifest, request.epoch
        return self.opened

    def status(self) -> pb.GetStatusResponse:
        return self.stub.GetStatus(pb.GetStatusRequest(), metadata=self.metadata, timeout=TIMEOUT)

    def job_status(self) -> pb.JobStatus:
        return next(status for status in self.status().jobs if status.job == self.job)

    def close(self) -> None:
        if self.opened is not None:
            request = pb.CloseSessionRequest(session_id=self.opened.session_id)
            self.stub.CloseSession(request, metadata=self.metadata, timeout=TIMEOUT)

    # The stream.

    def attach(self, credit_bytes: int = 64 << 20, *, answer: bool = True, read: bool = True) -> RawStream:
        assert self.opened is not None
        attach = pb.Attach(session_id=self.opened.session_id, epoch=self.epoch, credit_bytes=credit_bytes)
        stream = self.stream(pb.TrainerMessage(attach=attach), answer=answer, read=read)
        stream.until(lambda: stream.attached or stream.ended)
        return stream

    def stream(self, *first: pb.TrainerMessage, answer: bool = True, read: bool = True) -> RawStream:
        return RawStream(self, first, answer, read)


class RawStream:
    def __init__(self, trainer: RawTrainer, first, answer: bool, read: bool) -> None:
        self.trainer = trainer
        self.attached = False
        self.ended = False
        self.code: grpc.StatusCode | None = None
        self.details: str | None = None
        self.arrived: list[PackedBlock] = []
        self.receipts: list[tuple[int, int]] = []
        self.nacks: list[pb.Nack] = []
        self.drains: list[pb.Drain] = []
        self.chunk_bytes = 0
        self._answer = answer
        self._changed = threading.Condition()
        self._may_read = threading.Event()
        self._requests: queue.SimpleQueue[pb.TrainerMessage | None] = queue.SimpleQueue()
        for message in first:
            self._requests.put(message)
        layout = None if trainer.manifest is None else Layout.of_preconditioners(trainer.manifest)
        self._assembler = None if layout is None else Assembler(layout)
        self.call = trainer.stub.Exchange(iter(self._requests.get, None), metadata=trainer.metadata)
        if read:
            self._may_read.set()
        threading.Thread(target=self._read, daemon=True).start()

    def pause_reading(self) -> None:
        self._may_read.clear()

    def resume_reading(self) -> None:
        self._may_read.set()

    def send(self, *blocks: PackedBlock) -> None:
        for block in blocks:
            self._record(Kind.SNAPSHOT_SENT, block.block, block.step, sides=block.sides)
        for chunks in chunk_messages(blocks, message=pb.Chunks):
            self.put(chunks=chunks)

    def snapshot(self, block: int, step: int, *matrices: np.ndarray) -> None:
        self.send(PackedBlock(block, step, tuple(pack(matrix) for matrix in matrices)))

    def snapshot_messages(self, block: int, step: int, *matrices: np.ndarray, messages: int) -> None:
        """The first messages of a snapshot, and no more."""
        packed = PackedBlock(block, step, tuple(pack(matrix) for matrix in matrices))
        for chunks in itertools.islice(chunk_messages([packed], message=pb.Chunks), messages):
            self.put(chunks=chunks)

    def receipt(self, block: int, step: int) -> None:
        self.put(receipts=pb.Receipts(receipts=[pb.Receipt(block=block, step=step)]))

    def put(self, **kind) -> None:
        self._requests.put(pb.TrainerMessage(**kind))

    def half_close(self) -> None:
        self._requests.put(None)

    def cancel(self) -> None:
        self.call.cancel()

    def until(self, condition, timeout: float = TIMEOUT) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, timeout), (
                f"not within {timeout} s; arrived {[(b.block, b.step) for b in self.arrived]}, receipts "
                f"{self.receipts}, nacks {self.nacks}, ended {self.code} {self.details}"
            )

    def versions(self) -> list[tuple[int, int]]:
        return [(item.block, item.step) for item in self.arrived]

    def root(self, block: int, step: int, side: int = 0) -> np.ndarray:
        item = next(item for item in self.arrived if (item.block, item.step) == (block, step))
        return unpack(item.sides[side], self.trainer.manifest.blocks[block].sides[side].length)

    def _read(self) -> None:
        try:
            while True:
                self._may_read.wait()
                message = next(self.call, None)
                if message is None:
                    break
                with self._changed:
                    self._take(message)
                    self._changed.notify_all()
        except grpc.RpcError:
            pass
        with self._changed:
            self.code, self.details = self.call.code(), self.call.details()
            self.ended = True
            self._changed.notify_all()

    def _take(self, message: pb.ServiceMessage) -> None:
        kind = message.WhichOneof("kind")
        if kind == "attached":
            self.attached = True
        elif kind == "receipts":
            receipts = [(receipt.block, receipt.step) for receipt in message.receipts.receipts]
            self.receipts += receipts
            for block, step in receipts:
                self._record(Kind.SNAPSHOT_ACKNOWLEDGED, block, step)
        elif kind == "nacks":
            self.nacks += message.nacks.nacks
        elif kind == "drain":
            self.drains.append(message.drain)
        else:
            self.chunk_bytes += message.ByteSize()
            for chunk in message.chunks.chunks:
                for outcome in self._assembler.add(chunk):
                    assert isinstance(outcome, PackedBlock), outcome
                    self._record(Kind.RECEIVED, outcome.block, outcome.step, sides=outcome.sides)
                    self.arrived.append(outcome)
                    if self._answer:
                        self.receipt(outcome.block, outcome.step)

    def _record(self, kind: Kind, block: int, version: int, **data) -> None:
        if self.trainer.recorder is not None:
            scope = Scope(self.trainer.job, 0, self.trainer.epoch)
            self.trainer.recorder.record(kind, scope, block=block, version=version, **data)


def wait_for(condition, timeout: float = TIMEOUT, period: float = 0.02):
    until = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < until, f"not within {timeout} s"
        time.sleep(period)
    return value
