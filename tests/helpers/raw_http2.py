"""HTTP/2 as no gRPC client speaks it: frames by hand, over plain sockets."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import time
from collections import Counter

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings
from grpc import StatusCode

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SERVICE = "/preconditioner_protos.v1.PreconditionerService/"

_NAMES = {code.value[0]: code.name for code in StatusCode}


def framed(message: bytes, *, claimed: int | None = None, compressed: bool = False) -> bytes:
    """gRPC's framing, with any length."""
    return struct.pack(">BI", compressed, len(message) if claimed is None else claimed) + message


class Connection:
    """One HTTP/2 connection; ``statuses`` counts how its calls, and it, ended."""

    def __init__(self, address: str, window: int = 65535) -> None:
        host, _, port = address.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), timeout=5)
        self._readable = select.poll()  # select() ends at the thousandth file
        self._readable.register(self.socket, select.POLLIN)
        self.state = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
        self.state.initiate_connection()
        self.state.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window})
        self.statuses: Counter[str] = Counter()
        self.closed = False
        self._open: dict[int, float] = {}
        self.flush()

    def call(self, method: str, token: str | None, *more: tuple[str, str]) -> int:
        """Begin a call; its stream."""
        number = self.state.get_next_available_stream_id()
        headers = [
            (":method", "POST"), (":scheme", "http"), (":path", method), (":authority", "service"),
            ("content-type", "application/grpc"), ("te", "trailers"), *more,
        ]  # fmt: skip
        if token is not None:
            headers.append(("authorization", f"Bearer {token}"))
        self.state.send_headers(number, headers)
        self._open[number] = time.monotonic()
        self.flush()
        return number

    def send(self, number: int, data: bytes, end: bool = False) -> bool:
        """Send as much of a call's data as there is room for within a second; whether it was all."""
        until = time.monotonic() + 1
        while data and number in self._open and not self.closed and time.monotonic() < until:
            room = min(self.state.local_flow_control_window(number), self.state.max_outbound_frame_size)
            if room > 0:
                self.state.send_data(number, data[:room])
                data = data[room:]
                self.flush()
            self.receive(0 if room > 0 else 0.05)
        if end and not data and number in self._open:
            self.state.end_stream(number)
            self.flush()
        return not data

    def flush(self) -> None:
        try:
            self.socket.sendall(self.state.data_to_send())
        except OSError:
            self._end()

    def receive(self, seconds: float) -> None:
        """Take in what comes within a time."""
        until = time.monotonic() + seconds
        while not self.closed:
            left = max(0.0, until - time.monotonic())
            if not self._readable.poll(left * 1000):
                return
            try:
                data = self.socket.recv(65536)
                events = self.state.receive_data(data) if data else []
            except (OSError, h2.exceptions.ProtocolError):
                data, events = b"", []
            if not data:
                self._end()
                return
            for event in events:
                self._take(event)
            self.flush()

    def until_ended(self, seconds: float) -> None:
        """Wait until no call is open."""
        until = time.monotonic() + seconds
        while self._open and not self.closed and time.monotonic() < until:
            self.receive(0.05)

    def _take(self, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.DataReceived) and event.flow_controlled_length:
            with contextlib.suppress(h2.exceptions.ProtocolError):
                self.state.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, h2.events.TrailersReceived | h2.events.ResponseReceived):
            headers = {bytes(key): bytes(value) for key, value in event.headers}
            if b"grpc-status" in headers and self._open.pop(event.stream_id, None) is not None:
                self.statuses[_NAMES[int(headers[b"grpc-status"])]] += 1
        elif isinstance(event, h2.events.StreamReset):
            if self._open.pop(event.stream_id, None) is not None:
                self.statuses["reset"] += 1
        elif isinstance(event, h2.events.ConnectionTerminated):
            self.statuses[f"goaway {_error(event.error_code)}"] += 1

    def _end(self) -> None:
        if not self.closed:
            self.closed = True
            self.statuses["closed"] += 1
            self._open.clear()

    def close(self) -> None:
        self.socket.close()


def _error(code: object) -> str:
    return code.name if isinstance(code, h2.errors.ErrorCodes) else str(code)
