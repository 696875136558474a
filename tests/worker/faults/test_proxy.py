"""The proxy between two plain sockets."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from preconditioner_worker.faults.proxy import Proxy, Shape, Way


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)
        yield listener


@pytest.fixture
def proxy(listener):
    with Proxy(f"127.0.0.1:{listener.getsockname()[1]}") as proxy:
        yield proxy


@pytest.fixture
def ends(listener, proxy):
    host, _, port = proxy.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=10) as trainer:
        service, _ = listener.accept()
        with service:
            service.settimeout(10)
            seconds_of_round_trip(trainer, service)
            yield trainer, service


def ended(end):
    try:
        return end.recv(1) == b""
    except ConnectionResetError:
        return True


def seconds_of_round_trip(trainer, service, size=1):
    began = time.monotonic()
    sending = threading.Thread(target=trainer.sendall, args=(b"x" * size,))
    sending.start()
    received = 0
    while received < size:
        received += len(service.recv(65536))
    sending.join()
    service.sendall(b"y")
    assert trainer.recv(1) == b"y"
    return time.monotonic() - began


def test_it_carries_both_ways(ends):
    assert seconds_of_round_trip(*ends, size=3_000_000) < 5


def test_delay_and_rate(proxy, ends):
    proxy.shape(Shape(delay=0.1))
    assert 0.2 <= seconds_of_round_trip(*ends) < 2
    proxy.shape(Shape(rate=4e5), Way.UP)
    assert 1.0 <= seconds_of_round_trip(*ends, size=50_000) < 2
    proxy.heal()
    assert seconds_of_round_trip(*ends, size=50_000) < 1.0


def test_loss_stalls(proxy, ends):
    proxy.shape(Shape(loss=0.5))
    assert seconds_of_round_trip(*ends, size=20_000) > 0.4


def test_what_is_stalled_comes_once_healed(proxy, ends):
    trainer, service = ends
    proxy.stall(Way.UP)
    trainer.sendall(b"up")
    service.sendall(b"down")
    assert trainer.recv(4) == b"down"
    service.settimeout(0.2)
    with pytest.raises(TimeoutError):
        service.recv(2)
    proxy.heal()
    service.settimeout(10)
    assert service.recv(2) == b"up"


def test_it_stalls_after_an_exact_number_of_bytes(proxy, ends):
    trainer, service = ends
    stalled = proxy.stall_after(100_003, Way.UP)
    threading.Thread(target=trainer.sendall, args=(b"x" * 300_000,), daemon=True).start()
    assert stalled.wait(10)
    received = 0
    while received < 100_003:
        received += len(service.recv(65536))
    assert received == 100_003
    service.settimeout(0.2)
    with pytest.raises(TimeoutError):
        service.recv(1)
    proxy.heal()
    service.settimeout(10)
    while received < 300_000:
        received += len(service.recv(65536))


def test_while_it_is_cut_a_connection_stands_and_nothing_answers(listener, proxy):
    proxy.stall()
    host, _, port = proxy.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=10) as trainer:
        trainer.sendall(b"x")
        listener.settimeout(0.2)
        with pytest.raises(TimeoutError):
            listener.accept()
        proxy.heal()
        listener.settimeout(10)
        service, _ = listener.accept()
        with service:
            assert service.recv(1) == b"x"


def test_one_end_vanishes_and_the_other_is_not_told(proxy, ends):
    trainer, service = ends
    proxy.vanish(Way.UP)
    assert ended(service)
    trainer.sendall(b"x")
    trainer.settimeout(0.3)
    with pytest.raises(TimeoutError):
        trainer.recv(1)


def test_drop_breaks_both(proxy, ends):
    proxy.drop()
    assert all(ended(end) for end in ends)


def test_the_end_of_one_side_ends_the_other(ends):
    trainer, service = ends
    service.sendall(b"last")
    service.close()
    assert trainer.recv(4) == b"last"
    assert ended(trainer)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"delay": -1.0}, "delay must be >= 0 seconds, not -1.0"),
        ({"loss": 1.0}, r"loss must be in \[0, 1\), not 1.0"),
        ({"rate": 0.0}, "rate must be > 0 bit/s, not 0.0"),
    ],
)
def test_shapes_that_cannot_be(shape, message):
    with pytest.raises(ValueError, match=message):
        Shape(**shape)
