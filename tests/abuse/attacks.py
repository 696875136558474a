"""What an attacker does, one function per case. Each runs in a process of its own: see ``attacker.py``.

Every function takes an :class:`Attack` and keeps at it until ``attack.over``; what it saw goes to
``attack.saw``.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import grpc
import h2.exceptions

from preconditioner_protos import MAX_ENTRIES, PackedBlock, pack
from preconditioner_protos.v1 import preconditioner_pb2 as pb
from raw_http2 import PREFACE, SERVICE, Connection, framed
from raw_trainer import RawTrainer, manifest, open_request, statistics

CHECK, WATCH = "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"
LARGEST = 4 * 1024 * 1024 - 64
PATIENCE = 20.0


@dataclass
class Attack:
    """One attack under way.

    Attributes:
        address: of the service.
        token: a good one.
        seconds: how long.
        size: connections, calls or sessions; what it counts is the case's.
        wanted: what must be seen; on a busy machine it lasts until it was, up to :data:`PATIENCE` longer.
    """

    address: str
    token: str
    seconds: float
    size: int
    wanted: frozenset[str] = frozenset()
    saw: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._until = time.monotonic() + self.seconds
        self.trainers: list[RawTrainer] = []

    @property
    def over(self) -> bool:
        late = time.monotonic() - self._until
        return late >= PATIENCE or (late >= 0 and all(self.saw[name] for name in self.wanted))

    def trainer(self) -> RawTrainer:
        # Its own connection, or all trainers of a process share one.
        options = {"grpc.use_local_subchannel_pool": 1, "grpc.max_send_message_length": -1}
        self.trainers.append(RawTrainer(self.address, self.token, **options))
        return self.trainers[-1]

    def bytes_call(self, method: str, data: bytes) -> None:
        """A unary call with these bytes."""
        trainer = self.trainers[-1] if self.trainers else self.trainer()
        call = trainer.channel.unary_unary(SERVICE + method, bytes, bytes)
        self.refused(lambda: call(data, metadata=trainer.metadata, timeout=20))

    def refused(self, call: Callable[[], object]) -> None:
        try:
            call()
        except grpc.RpcError as error:
            self.saw[error.code().name] += 1
        else:
            self.saw["OK"] += 1

    def connection(self, window: int = 65535) -> Connection | None:
        try:
            return Connection(self.address, window)
        except OSError:
            self.saw["not connected"] += 1
            return None

    def hold(self, connections: Iterable[Connection]) -> None:
        """Keep them open, reading, until the time is over; count how their calls end."""
        connections = list(connections)
        while not self.over:
            for connection in connections:
                connection.receive(0)
                self.saw.update(connection.statuses)
                connection.statuses.clear()
            time.sleep(0.02)
        for connection in connections:
            connection.close()


def _paced(attack: Attack, rate: float) -> Iterable[int]:
    """Numbers, at most so many a second."""
    began = time.monotonic()
    for number in itertools.count():
        if attack.over:
            return
        yield number
        time.sleep(max(0.0, began + (number + 1) / rate - time.monotonic()))


# Requests that claim more than they may have.


def claims_of_huge_sides(attack: Attack) -> None:
    """Sides of 2**31."""
    trainer = attack.trainer()
    for number in _paced(attack, attack.size):
        request = open_request(f"huge{number}", manifest((2**31, 2**31)))
        attack.refused(lambda request=request: trainer.open(request))


def million_blocks(attack: Attack) -> None:
    """A manifest of a million blocks in two bytes each; and of three million, which no message holds."""
    empty = open_request("million", pb.Manifest()).SerializeToString()
    for number in _paced(attack, 8):
        blocks = b"\x0a\x00" * (3_000_000 if number % 4 == 0 else 1_000_000)
        attack.bytes_call("OpenSession", empty + b"\x32" + _varint(len(blocks)) + blocks)


def large_manifests(attack: Attack) -> None:
    """As many blocks as are allowed, again and again, with a larger epoch each time."""
    request = open_request("large", manifest(*[(2,)] * attack.size))
    trainer = attack.trainer()
    while not attack.over:
        request.epoch += 1
        attack.refused(lambda: trainer.open(request))


def gigabyte_messages(attack: Attack) -> None:
    """Claims of a gigabyte, with as much of it as is taken; and messages of 64 MiB, a gigabyte in all."""
    body = bytes(64 * 2**20)
    for number in _paced(attack, 10):
        if number % 5 == 0:
            attack.bytes_call("OpenSession", body)
        elif (connection := attack.connection()) is not None:
            call = connection.call(SERVICE + "OpenSession", attack.token)
            connection.send(call, framed(bytes(2**20), claimed=2**30))
            connection.until_ended(2)
            attack.saw.update(connection.statuses)
            connection.close()


def compressed_bombs(attack: Attack) -> None:
    """A quarter of a gigabyte of zeros, compressed to a quarter of a megabyte."""
    packer = zlib.compressobj(9, wbits=31)
    bomb = b"".join(packer.compress(bytes(2**20)) for _ in range(256)) + packer.flush()
    for _ in _paced(attack, 10):
        if (connection := attack.connection()) is not None:
            call = connection.call(SERVICE + "OpenSession", attack.token, ("grpc-encoding", "gzip"))
            connection.send(call, framed(bomb, compressed=True), end=True)
            connection.until_ended(5)
            attack.saw.update(connection.statuses)
            connection.close()


def entry_floods(attack: Attack) -> None:
    """Messages of two million empty chunks, receipts, or both in turn."""
    trainer = attack.trainer()
    opened = trainer.open(open_request("entries", manifest((4,))))
    attach = pb.TrainerMessage(attach=pb.Attach(session_id=opened.session_id, epoch=1)).SerializeToString()
    half = b"\x0a\x00" * (LARGEST // 2)
    floods = [tag + _varint(len(half)) + half for tag in (b"\x12", b"\x1a")]
    floods.append((b"\x12\x02\x0a\x00" + b"\x1a\x02\x0a\x00") * (LARGEST // 8))
    call = trainer.channel.stream_stream(SERVICE + "Exchange", bytes, bytes)
    for number in _paced(attack, 10):
        messages = [attach, floods[number % 3]]
        attack.refused(lambda messages=messages: list(call(iter(messages), metadata=trainer.metadata)))


def metadata_floods(attack: Attack) -> None:
    """A megabyte of metadata."""
    more = [(f"x-{number}", "v" * 10_000) for number in range(100)]
    for _ in _paced(attack, 20):
        if (connection := attack.connection()) is not None:
            connection.receive(0.3)  # the service's own limits of frames
            with contextlib.suppress(h2.exceptions.ProtocolError):  # ended while it was being sent
                connection.call(SERVICE + "GetStatus", attack.token, *more)
            connection.until_ended(5)
            attack.saw.update(connection.statuses)
            connection.close()


# Many of them, and slow ones.


def idle_connections(attack: Attack) -> None:
    """Thousands of connections on which nothing is called."""
    held = []
    for _ in range(attack.size):
        if attack.over:
            break
        if (connection := attack.connection()) is not None:
            connection.receive(0)
            held.append(connection)
    attack.saw["held"] += len(held)
    attack.hold(held)


def half_prefaces(attack: Attack) -> None:
    """Connections that send the first bytes of HTTP/2 and no more."""
    host, _, port = attack.address.rpartition(":")
    held = []
    for _ in range(attack.size):
        try:
            held.append(socket.create_connection((host, int(port)), timeout=2))
            held[-1].sendall(PREFACE[:10])
        except OSError:
            attack.saw["closed"] += 1
    for connection in held:
        connection.setblocking(False)
    while not attack.over:
        for connection in [*held]:
            with contextlib.suppress(BlockingIOError):
                try:
                    closed = not connection.recv(65536)
                except ConnectionError:
                    closed = True
                if closed:
                    attack.saw["closed"] += 1
                    held.remove(connection)
        time.sleep(0.1)
    attack.saw["still open"] += len(held)


def silent_calls(attack: Attack) -> None:
    """Calls whose first message never comes, new ones all the time."""
    _calls(attack, SERVICE + "Exchange", attack.token, b"")


def trickled_calls(attack: Attack) -> None:
    """Calls of which all but the last byte of the largest message comes."""
    _calls(
        attack, SERVICE + "OpenSession", attack.token, framed(bytes(LARGEST - 1), claimed=LARGEST), rate=60
    )


def calls_without_token(attack: Attack) -> None:
    """Calls without a token, with the largest of messages."""
    _calls(attack, SERVICE + "OpenSession", None, framed(bytes(60_000), claimed=LARGEST))


def health_watchers(attack: Attack) -> None:
    """Watches of the health service, which is open to all."""
    _calls(attack, WATCH, None, framed(b""))


def silent_checks(attack: Attack) -> None:
    """Checks of the health service, which need no token, whose message never comes."""
    _calls(attack, CHECK, None, b"")


def deaf_watchers(attack: Attack) -> None:
    """Watches of the health service that leave no room for a byte, while others check it."""
    connection = attack.connection(window=0)
    for number in _paced(attack, 200):
        if connection is not None and not connection.closed and number < attack.size:
            with contextlib.suppress(h2.exceptions.ProtocolError):  # beyond the streams that it allows
                connection.send(connection.call(WATCH, None), framed(b""), end=True)
        if number % 20 == 0:
            check = attack.trainer().channel.unary_unary(CHECK, bytes, bytes)
            attack.refused(lambda check=check: check(b"", timeout=20))


def _calls(attack: Attack, method: str, token: str | None, data: bytes, rate: float = 500) -> None:
    held: list[Connection] = []
    for number in _paced(attack, rate):
        if number == attack.size:
            break
        if not held or number % 100 == 0:
            connection = attack.connection()
            if connection is None:
                continue
            held.append(connection)
        with contextlib.suppress(h2.exceptions.ProtocolError):  # beyond the streams that it allows
            connection = held[-1]
            stream = connection.call(method, token)
            if data:
                connection.send(stream, data)
        held[-1].receive(0)
    attack.hold(held)


def unread_answers(attack: Attack) -> None:
    """Calls whose answers are never taken: the attacker leaves no room for a byte."""
    held = []
    for number in _paced(attack, 200):
        if number % 50 == 0 and (connection := attack.connection(window=0)) is not None:
            held.append(connection)
        if number == attack.size:
            break
        with contextlib.suppress(h2.exceptions.ProtocolError):  # a connection that the service closed
            stream = held[-1].call(SERVICE + "GetStatus", attack.token)
            held[-1].send(stream, framed(b""), end=True)
    trainer = attack.trainer()
    while not attack.over:
        attack.refused(trainer.status)  # whoever reads is answered: their places are free again
        time.sleep(0.1)


def rapid_resets(attack: Attack) -> None:
    """Calls that are begun and reset at once."""
    while not attack.over:
        connection = attack.connection()
        if connection is None:
            continue
        for number in range(1000):
            with contextlib.suppress(h2.exceptions.ProtocolError):
                connection.state.reset_stream(connection.call(SERVICE + "Exchange", attack.token))
                connection.flush()
            if number % 50 == 0:
                connection.receive(0)
            if connection.closed or attack.over:
                break
        attack.saw.update(connection.statuses or {"reset by the attacker": number})
        connection.close()


def pings(attack: Attack) -> None:
    """PINGs without end."""
    while not attack.over:
        connection = attack.connection()
        if connection is None:
            continue
        while not (connection.closed or attack.over):
            with contextlib.suppress(h2.exceptions.ProtocolError):  # after the service's GOAWAY
                for _ in range(100):
                    connection.state.ping(bytes(8))
            connection.flush()
            connection.receive(0.01)
        attack.saw.update(connection.statuses)
        connection.close()


def status_calls(attack: Attack) -> None:
    """GetStatus, as fast as one connection brings it."""
    trainer = attack.trainer()
    while not attack.over:
        attack.refused(trainer.status)


# With a session.


def old_epochs(attack: Attack) -> None:
    """A fenced epoch that opens, attaches and sends again."""
    trainer = attack.trainer()
    blocks = manifest((4,))
    old = trainer.open(open_request("fenced", blocks, epoch=1))
    trainer.open(open_request("fenced", blocks, epoch=2))
    attach = pb.TrainerMessage(attach=pb.Attach(session_id=old.session_id, epoch=1))
    for number in _paced(attack, 200):
        if number % 2:
            attack.refused(lambda: trainer.open(open_request("fenced", blocks, epoch=1)))
        else:
            attack.refused(
                lambda: list(trainer.stub.Exchange(iter([attach]), metadata=trainer.metadata, timeout=20))
            )


def foreign_blocks(attack: Attack) -> None:
    """Snapshots and receipts of blocks that the session does not have, and a session id that is guessed."""
    trainer = attack.trainer()
    trainer.open(open_request("foreign", manifest((4,))))
    stream = trainer.attach()
    for number in _paced(attack, 200):
        stream.send(PackedBlock((number % 1000) + 1, number + 1, (pack(statistics(4)),)))
        stream.receipt(2**32 - 1, number)
        if number % 20 == 0:
            attach = pb.TrainerMessage(attach=pb.Attach(session_id="guessed", epoch=1))
            attack.refused(
                lambda attach=attach: list(
                    trainer.stub.Exchange(iter([attach]), metadata=trainer.metadata, timeout=20)
                )
            )
            attack.saw["NACK_REASON_MALFORMED"] = sum(
                nack.reason == pb.NACK_REASON_MALFORMED for nack in stream.nacks
            )
    attack.saw["stream ended"] += stream.ended


def dropped_sessions(attack: Attack) -> None:
    """Sessions opened and left, each of another job."""
    trainer = attack.trainer()
    blocks = manifest(*[(64, 64)] * 20)
    for number in _paced(attack, 300):
        request = open_request(f"dropped{number}", blocks, client="x" * 10_000)
        attack.refused(lambda request=request: trainer.open(request))


def unread_pushes(attack: Attack) -> None:
    """As many sessions as there is room for; all send snapshots, none ever reads."""
    blocks = manifest(*[(128, 128)] * 16)
    streams = []
    for number in range(attack.size):
        trainer = attack.trainer()
        try:
            trainer.open(open_request(f"unread{number}", blocks))
        except grpc.RpcError as error:
            attack.saw[error.code().name] += 1
            continue
        attack.saw["OK"] += 1
        attach = pb.Attach(session_id=trainer.opened.session_id, epoch=1, credit_bytes=2**40)
        streams.append(trainer.stream(pb.TrainerMessage(attach=attach), read=False))
    packed = pack(statistics(128))
    for step in itertools.count(1):
        if attack.over:
            break
        for stream in streams:
            stream.send(*(PackedBlock(block, step, (packed, packed)) for block in range(16)))
        time.sleep(1.0)


def tiny_chunks(attack: Attack) -> None:
    """Streams of messages that hold as many matrices of one value as they may."""
    one = pack(statistics(1)).tobytes()
    crc = zlib.crc32(one)
    streams = []
    for number in range(attack.size):
        trainer = attack.trainer()
        trainer.open(open_request(f"tiny{number}", manifest((1,))))
        streams.append(trainer.attach())
    for batch in itertools.count():
        if attack.over:
            break
        steps = range(batch * MAX_ENTRIES + 1, (batch + 1) * MAX_ENTRIES + 1)
        chunks = pb.Chunks(chunks=[pb.MatrixChunk(step=step, payload=one, crc32=crc) for step in steps])
        for stream in streams:
            stream.put(chunks=chunks)
        first = steps[0]
        while not attack.over and any(len(stream.receipts) < first - 1 for stream in streams):
            time.sleep(0.01)
            attack.saw["receipts"] = sum(len(stream.receipts) for stream in streams)


def snapshot_floods(attack: Attack) -> None:
    """A job that keeps far more than its share of blocks waiting at all times."""
    trainer = attack.trainer()
    trainer.open(open_request("flood", manifest(*[(512, 512)] * attack.size)))
    stream = trainer.attach()
    packed = pack(statistics(512))
    for step in itertools.count(1):
        if attack.over:
            break
        for block in range(attack.size):
            stream.send(PackedBlock(block, step, (packed, packed)))
            while not attack.over and len(stream.receipts) < (step - 1) * attack.size + block - 4:
                time.sleep(0.005)
            attack.saw["receipts"] = len(stream.receipts)
            attack.saw["pushed"] = len(stream.arrived)
        time.sleep(0.1)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
