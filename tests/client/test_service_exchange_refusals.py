"""Who may not: refusals of a session, and what the first look at an address tells."""

from __future__ import annotations

import logging
import re
from concurrent import futures

import grpc
import pytest
import torch

from exchange_session import collect, opened, session, snapshot
from fake_front import FakeFront, until
from preconditioner_client import ServiceConfig, Shampoo
from preconditioner_client.exchange import ExchangeError
from preconditioner_client.supervisor import Supervisor
from preconditioner_protos.v1 import preconditioner_pb2 as pb
from preconditioner_service.calls import EndOfStream
from preconditioner_service.decoding import decode_open_request
from preconditioner_service.policy import Grant
from preconditioner_service.quotas import QuotaError, Quotas, Usage
from service_process import free_port


def test_a_superseded_trainer_never_comes_back(front, connect, caplog):
    exchange = connect(front.address)
    opened(exchange, session(job="twin"))
    with caplog.at_level(logging.ERROR, "preconditioner_client"):
        front.stream.end(grpc.StatusCode.ABORTED, "epoch 2 took over")
        until(lambda: caplog.records)
    assert "'twin' was taken over" in caplog.text
    assert not exchange.wait(0.5)
    assert (front.attaches, len(front.opens)) == (1, 1)
    exchange.collect(1)  # training goes on
    opened(exchange, session(job="twin", epoch=3))  # a later epoch may


def test_a_trainer_that_was_told_why_is_not_told_to_train_longer(front, connect, caplog):
    exchange = connect(front.address)
    spec = opened(exchange, session(job="twin"))
    exchange.offer([snapshot(spec, 0, 1)], 1)
    front.stream.end(grpc.StatusCode.ABORTED, "epoch 2 took over")
    until(lambda: "was taken over" in caplog.text)
    exchange.close()
    assert "blocks had no preconditioner" not in caplog.text


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("ABORTED", "taken over"),
        ("PERMISSION_DENIED", "does not open job 'test'"),
        ("INVALID_ARGUMENT", "side 3 is odd"),
        ("RESOURCE_EXHAUSTED", "quota"),
        ("FAILED_PRECONDITION", "protocol version"),
        ("UNIMPLEMENTED", "no preconditioner service"),
    ],
)
def test_a_refusal_before_the_first_session_is_raised_once(front, connect, code, text):
    front.open_error = (grpc.StatusCode[code], "side 3 is odd")
    exchange = connect(front.address)
    exchange.open(session())
    assert exchange.wait(10)
    with pytest.raises(ExchangeError, match=text):
        exchange.collect(0)
    assert not exchange.wait(0.3)
    assert exchange.collect(1) == []


MANY = pb.Manifest(blocks=[pb.Block(name="a(max_jobs)", sides=[pb.Side(length=8)])] * 3)
QUOTAS = Quotas(max_sessions=1, max_blocks=2, max_side=4, max_job_bytes=1)


@pytest.mark.parametrize(
    ("refuse", "way_out"),
    [
        (lambda: QUOTAS.check_size(MANY), "fewer blocks (a larger block_size"),
        (lambda: QUOTAS.check_sides(MANY), "smaller blocks (a smaller block_size"),
        (lambda: QUOTAS.check_job("a", Usage(1), Usage(1)), "fewer ranks, end another session"),
        (lambda: QUOTAS.check_job("a", Usage(), Usage(1, 3)), "fewer blocks (a larger block_size"),
        (lambda: QUOTAS.check_job("a", Usage(), Usage(1, 1, 9)), "send less (a smaller max_side"),
        (
            lambda: Grant(name="*", tokens=(), weight=1, quotas=QUOTAS, max_jobs=1).check_jobs("a", ["b"]),
            "end another of these jobs, wait until",
        ),
        (
            lambda: decode_open_request(pb.OpenSessionRequest(manifest=MANY).SerializeToString(), 2),
            "fewer blocks (a larger block_size",
        ),
    ],
)
def test_the_way_out_is_that_of_the_quota(front, connect, refuse, way_out):
    with pytest.raises((QuotaError, EndOfStream)) as caught:
        refuse()
    details = str(caught.value)
    front.open_error = (grpc.StatusCode.RESOURCE_EXHAUSTED, details)
    exchange = connect(front.address)
    exchange.open(session())
    assert exchange.wait(10)
    with pytest.raises(ExchangeError, match=re.escape(details)) as told:
        exchange.collect(0)
    assert way_out in str(told.value)


def test_a_later_refusal_is_logged_once_and_tried_again(front, connect, caplog, tmp_path):
    path = tmp_path / "token"
    path.write_text("first\n")
    front.token = "first"
    exchange = connect(front.address, token_file=str(path))
    opened(exchange, session())
    with caplog.at_level(logging.ERROR, "preconditioner_client"):
        front.token = "second"
        front.stream.end(grpc.StatusCode.UNAVAILABLE)
        until(lambda: caplog.records)
        assert not exchange.wait(0.4)  # several attempts
    assert len(caplog.records) == 1
    assert exchange.collect(1) == []
    path.write_text("second\n")
    until(lambda: exchange.generation == 2)
    assert "second" not in caplog.text


def test_a_replaced_token_is_used_long_before_the_pause_after_a_refusal_is_over(
    front, connect, caplog, monkeypatch, tmp_path
):
    monkeypatch.setattr(Supervisor, "REFUSED_PAUSE", 600.0)
    path = tmp_path / "token"
    path.write_text("first\n")
    front.token = "first"
    exchange = connect(front.address, token_file=str(path))
    opened(exchange, session())
    front.token = "second"
    with caplog.at_level(logging.ERROR, "preconditioner_client"):
        front.stream.end(grpc.StatusCode.UNAUTHENTICATED)
        until(lambda: "refuses the token" in caplog.text)
    path.unlink()
    path.write_text("second\n")
    until(lambda: exchange.generation == 2)


def test_a_token_that_was_replaced_in_time_is_no_refusal(front, connect, caplog, monkeypatch, tmp_path):
    """What the operator of a rotation sees: new token in the file, old one revoked at the service."""
    monkeypatch.setattr(Supervisor, "REFUSED_PAUSE", 600.0)
    path = tmp_path / "token"
    path.write_text("first\n")
    front.token = "first"
    exchange = connect(front.address, token_file=str(path))
    opened(exchange, session())
    path.write_text("second\n")
    front.token = "second"
    with caplog.at_level(logging.WARNING, "preconditioner_client"):
        front.stream.end(grpc.StatusCode.UNAUTHENTICATED)
        until(lambda: exchange.generation == 2)
    assert not caplog.records


def test_a_placement_on_several_fronts_is_refused(front, connect):
    front.fronts = [pb.Front(address="127.0.0.1:1", blocks=[0]), pb.Front(blocks=[1])]
    exchange = connect(front.address)
    exchange.open(session())
    assert exchange.wait(10)
    with pytest.raises(ExchangeError, match="2 fronts"):
        exchange.collect(0)


def test_the_front_of_the_placement_is_dialled(front, connect):
    other = FakeFront()
    try:
        request_of = other._sessions
        front.fronts = [pb.Front(address=other.address)]
        other._sessions = front._sessions
        exchange = connect(front.address)
        opened(exchange, session())
        assert (front.attaches, other.attaches) == (0, 1)
        exchange.close()
        assert front.closed == ["s0"]
        other._sessions = request_of
    finally:
        other.stop()


def test_a_front_off_loopback_is_not_dialled_in_the_clear(front, connect):
    front.fronts = [pb.Front(address="192.0.2.1:50051")]
    exchange = connect(front.address)
    exchange.open(session())
    assert exchange.wait(10)
    with pytest.raises(ExchangeError, match="not on loopback"):
        exchange.collect(0)


def test_a_wrong_token_is_told_at_construction(front, connect):
    front.token = "right-token"
    with pytest.raises(ExchangeError, match=r"refuses the token.*PRECONDITIONER_TOKEN") as caught:
        connect(front.address, token="wrong-token")
    assert "wrong-token" not in str(caught.value)
    with pytest.raises(ExchangeError, match="refuses the token"):
        connect(front.address)
    opened(connect(front.address, token="right-token"), session())


def test_another_protocol_version_is_told_at_construction(front, connect):
    front.protocol_version = 2
    with pytest.raises(ExchangeError, match="speaks protocol versions 2 to 2, this client 1"):
        connect(front.address)


def test_something_else_at_the_address_is_told_at_construction(connect):
    server = grpc.server(futures.ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with pytest.raises(ExchangeError, match="no preconditioner service"):
            connect(f"127.0.0.1:{port}")
    finally:
        server.stop(None)


def test_an_unreachable_service_is_warned_of_once_and_found_later(connect, caplog):
    port = free_port()
    with caplog.at_level(logging.WARNING, "preconditioner_client"):
        exchange = connect(f"127.0.0.1:{port}")
        spec = session()
        exchange.open(spec)
        exchange.offer([snapshot(spec, 0, 1)], 1)
        assert not exchange.wait(0.5)
    assert len(caplog.records) == 1
    assert f"127.0.0.1:{port}" in caplog.text
    front = FakeFront(port)
    try:
        collect(exchange, 1)
        exchange.close()
    finally:
        front.stop()


def test_a_proxy_is_not_asked_for_loopback(front, connect, monkeypatch):
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    opened(connect(front.address), session())


def test_tls_on_one_side_only_is_told_at_construction(connect, certificates):
    credentials = grpc.ssl_server_credentials([(certificates.key, certificates.chain)])
    secure, plain = FakeFront(credentials=credentials), FakeFront()
    try:
        with pytest.raises(ExchangeError, match="speaks TLS: set tls=True"):
            connect(secure.address)
        with pytest.raises(ExchangeError, match="no TLS connection"):
            connect(plain.address, tls=True)
        with pytest.raises(ExchangeError, match="no TLS connection"):
            connect(secure.address, tls=True)  # an authority that nobody knows
        exchange = connect(f"localhost:{secure.port}", tls_ca=certificates.path)
        opened(exchange, session())
        exchange.close()
    finally:
        secure.stop()
        plain.stop()


def test_a_new_life_of_a_job_has_a_larger_epoch_though_the_clock_was_set_back(front):
    newest = 1 << 62  # of a trainer whose clock went ahead
    front.jobs = [pb.JobStatus(job="restarted", epoch=newest), pb.JobStatus(job="other", epoch=2 * newest)]
    parameter = torch.nn.Parameter(torch.ones(3, 3))
    optimizer = Shampoo([parameter], service=ServiceConfig(address=front.address, job="restarted"))
    try:
        parameter.grad = torch.ones(3, 3)
        optimizer.step()
        until(lambda: front.opens)
        assert front.opens[0].epoch == newest + 1
    finally:
        optimizer.close()
