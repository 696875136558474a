"""What strangers bring about in the log: their address, few lines, and none that gRPC writes by itself."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys

import grpc
import pytest

from in_process_service import InProcessService
from preconditioner_service import auth, logs
from preconditioner_service.certificates import make_certificates

TOKEN = "hush-hush"


@pytest.fixture
def refused(caplog, monkeypatch):
    monkeypatch.setattr(logs, "_LIMITER", logs.Limiter())
    monkeypatch.setattr(logs.LOGGER, "propagate", True)
    caplog.set_level(logging.INFO, logger=logs.LOGGER.name)
    return lambda: [record.fields for record in caplog.records if record.getMessage() == "unauthenticated"]


def test_refused_calls_are_logged_with_their_peer(refused):
    service = InProcessService(token=TOKEN)
    trainer = service.trainer("wrong")
    for _ in range(3):
        with pytest.raises(grpc.RpcError):
            trainer.status()
    trainer.channel.close()
    service.stop()
    (entry,) = refused()
    assert entry["peer"].startswith("ipv4:127.0.0.1:")
    assert entry["method"].endswith("/GetStatus")


def test_one_stranger_does_not_hide_another_and_many_write_few_lines(refused):
    for network in range(4):
        for host in range(250):
            auth.log_refused("/x", f"ipv4:10.0.{network}.{host}:1")
    entries = refused()
    assert 2 <= len(entries) <= 16
    assert len({entry["peer"] for entry in entries}) == len(entries)


_SERVE = """
import sys
from preconditioner_service import cli, logs

quiet_grpc = logs.quiet_grpc

def then_serve_without_ray(environ):
    quiet_grpc(environ)
    from preconditioner_service import serve
    serve.run = run

def run(settings, out):
    from in_process_service import InProcessService
    service = InProcessService(token="x", tls_cert=settings.tls_cert, tls_key=settings.tls_key)
    print(service.port, file=out, flush=True)
    sys.stdin.read()
    service.stop()
    return 0

logs.quiet_grpc = then_serve_without_ray
sys.exit(cli.main(["serve", "--tls-cert", sys.argv[1], "--tls-key", sys.argv[2]]))
"""


@pytest.mark.parametrize("verbosity", [None, "INFO"])
def test_failed_handshakes_write_nothing_unless_the_operator_asks(tmp_path, verbosity):
    files = make_certificates(tmp_path / "certificates", ["localhost"])
    environment = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}
    environment |= {"PRECONDITIONER_SERVICE_TOKEN": TOKEN, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment |= {"GRPC_VERBOSITY": verbosity} if verbosity else {}
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVE, str(files.server), str(files.server_key)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
    )
    try:
        port = int(process.stdout.readline())
        for greeting in (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n"):
            with socket.create_connection(("127.0.0.1", port), timeout=10) as plain:
                plain.sendall(greeting)
                while plain.recv(100):
                    pass
    finally:
        _, error = process.communicate(timeout=30)
    assert process.returncode == 0, error
    assert ("Handshake failed" in error) is (verbosity is not None)
    assert verbosity is not None or error == ""
