"""A service as an operator runs it (mutual TLS, a jobs file, debug logs) and a trainer, with known secrets.

They go through success and failure; then everything that either of them wrote or said is searched.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import urllib.error
import urllib.request
from pathlib import Path

import grpc
import psutil
import pytest
import torch
from conftest import PREFIX, ServiceProcess

from preconditioner_client import ExchangeError, ServiceConfig, Shampoo, tls_probe
from preconditioner_protos.v1 import preconditioner_pb2 as pb
from preconditioner_protos.v1 import preconditioner_pb2_grpc as pb_grpc
from preconditioner_service import tokens
from preconditioner_service.certificates import make_certificates
from preconditioner_service.settings import ServeSettings
from processes import command_line, listening, named
from raw_trainer import wait_for

GOOD, ROTATED, FOREIGN, WRONG, PASTED = (
    f"{name}-{tokens.new_token()}" for name in ("good", "next", "other", "wrong", "plain")
)


def digest(token: str) -> str:
    return tokens.show(tokens.digest(token))


class Site:
    """The operator's files, and the service that reads them."""

    def __init__(self, directory: Path) -> None:
        self.certificates = make_certificates(directory / "certs", ["localhost", "127.0.0.1"])
        self.stranger = make_certificates(directory / "stranger", ["localhost"])
        self.jobs = directory / "jobs.toml"
        self.write_jobs(GOOD)
        self.history = directory / "service.jsonl"
        self.token = directory / "token"
        self.token.write_text(f"{GOOD}\n")
        self.token.chmod(0o600)
        files = self.certificates
        self.service = ServiceProcess(
            directory,
            "--num-workers=1",
            "--log-level=debug",
            f"--jobs-file={self.jobs}",
            f"--tls-cert={files.server}",
            f"--tls-key={files.server_key}",
            f"--tls-client-ca={files.ca}",
            f"--history-file={self.history}",
            environment={f"{PREFIX}TOKEN": None, "GRPC_VERBOSITY": "info"},
        )
        assert self.service.line["event"] == "ready", self.service.line
        self.address = f"localhost:{self.service.address.rpartition(':')[2]}"

    def write_jobs(self, *good: str) -> None:
        entries = [f"[jobs.secretive]\ntokens = {[digest(token) for token in good]}"]
        entries += [f"[jobs.another]\ntokens = ['{digest(FOREIGN)}']"]
        new = self.jobs.with_suffix(".new")
        new.write_text("\n".join(entries))
        new.rename(self.jobs)

    def config(self, **other: object) -> ServiceConfig:
        files = self.certificates
        settings = {"tls_ca": str(files.ca), "tls_cert": str(files.client), "tls_key": str(files.client_key)}
        settings |= {"address": self.address, "job": "secretive", "token_file": str(self.token)}
        return ServiceConfig(**(settings | other))

    def secrets(self) -> list[str]:
        keys = [*self.certificates.directory.glob("*.key"), *self.stranger.directory.glob("*.key")]
        lines = [
            line for path in keys for line in path.read_text().splitlines() if not line.startswith("-----")
        ]
        return [GOOD, ROTATED, FOREIGN, WRONG, PASTED, *lines, self.ray_environment()["RAY_AUTH_TOKEN"]]

    def status(self) -> pb.GetStatusResponse:
        """What the service tells a trainer that has the new token."""
        files = self.certificates
        credentials = grpc.ssl_channel_credentials(
            files.ca.read_bytes(), files.client_key.read_bytes(), files.client.read_bytes()
        )
        with grpc.secure_channel(self.address, credentials) as channel:
            return pb_grpc.PreconditionerServiceStub(channel).GetStatus(
                pb.GetStatusRequest(), metadata=(("authorization", f"Bearer {ROTATED}"),), timeout=30
            )

    def process(self, name: str) -> psutil.Process:
        return named(name, self.service.family())

    def ray_environment(self) -> dict[str, str]:
        return self.process("raylet").environ()

    def ray_directory(self) -> Path:
        (option,) = (
            part for part in self.process("raylet").cmdline() if part.startswith("--store_socket_name=")
        )
        return Path(option.partition("=")[2]).parents[1]

    def gcs(self) -> str:
        (option,) = (part for part in self.process("raylet").cmdline() if part.startswith("--gcs-address="))
        return option.partition("=")[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    site = Site(tmp_path_factory.mktemp("site"))
    yield site
    site.service.end()


def train(optimizer: Shampoo, model: torch.nn.Module, until) -> None:
    def step() -> bool:
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        return until(optimizer.metrics())

    wait_for(step)


def refused(site: Site, text: str, **settings: object) -> str:
    model = torch.nn.Linear(3, 2)
    with pytest.raises(ExchangeError, match=text) as caught:
        optimizer = Shampoo(model.parameters(), lr=0.1, service=site.config(**settings))
        train(optimizer, model, lambda metrics: False)
    return f"{caught.value!r} {caught.value}"


def test_secrets_are_nowhere_but_in_their_files(site, start, caplog, capfd, tmp_path, monkeypatch):
    monkeypatch.setattr(tls_probe, "_LONGEST_WAIT", 30.0)
    caplog.set_level(logging.DEBUG)
    said = [repr(site.config(token=GOOD, token_file=None)), repr(site.config())]
    model = torch.nn.Linear(3, 2)
    own_history = tmp_path / "trainer.jsonl"
    optimizer = Shampoo(model.parameters(), lr=0.1, service=site.config(history_file=str(own_history)))
    train(optimizer, model, lambda metrics: metrics["blocks_with_version"] == metrics["blocks"])

    stranger = {"tls_cert": str(site.stranger.client), "tls_key": str(site.stranger.client_key)}
    said += [
        refused(site, "refuses the token", token_file=None, token=WRONG),
        refused(site, "does not open job 'secretive'", token_file=None, token=FOREIGN),
        refused(site, "does not accept the certificate of this client", **stranger),
        refused(site, "wants a certificate", tls_cert=None, tls_key=None),
        refused(site, "is not trusted", tls_ca=str(site.stranger.ca)),
    ]

    # A crash, a rotation at a signal, files that break.
    (worker,) = site.service.workers()
    worker.send_signal(signal.SIGKILL)
    wait_for(lambda: re.search("worker (lost|restarted)", site.service.log()))
    site.token.write_text(f"{ROTATED}\n")
    site.write_jobs(ROTATED)
    os.kill(site.service.process.pid, signal.SIGHUP)
    wait_for(lambda: "the token is no longer good" in site.service.log())
    newest = optimizer.metrics()["versions_adopted"]
    train(optimizer, model, lambda metrics: metrics["versions_adopted"] > newest)
    broken = tmp_path / "broken.toml"  # an empty file, as it is while it is written, would be none
    broken.write_text(f"[jobs.secretive]\ntokens = ['{PASTED}']\n")
    broken.replace(site.jobs)
    wait_for(lambda: "tokens themselves do not belong here" in site.service.log())
    site.certificates.server_key.chmod(0o644)
    site.certificates.server_key.write_bytes(site.stranger.server_key.read_bytes())
    wait_for(lambda: "is not the key of tls_cert" in site.service.log())
    assert site.service.process.poll() is None, "SIGHUP and broken files are no end"

    # A start that fails, for the very same mistakes.
    variables = {f"{PREFIX}TOKEN": None}
    failed = start(f"--jobs-file={site.jobs}", environment=variables)
    said += [str(failed.line), failed.log()]
    assert failed.line["event"] == "failed"
    pasted = tmp_path / "pasted"
    pasted.write_text(f"{PASTED} {WRONG}\n")
    failed = start(f"--token-file={pasted}", environment=variables)
    said += [str(failed.line), failed.log()]
    assert "white space" in failed.line["reason"]

    settings = ServeSettings(
        token=GOOD, tls_cert=site.certificates.server, tls_key=site.certificates.server_key
    )
    said += [repr(settings), str(settings.model_dump()), settings.model_dump_json()]
    said += [str(optimizer.metrics()), str(optimizer.state_dict()["state"]), repr(optimizer)]
    # What the service tells of the job while it is there, and what both keep of it.
    status = str(site.status())
    assert "secretive" in status
    optimizer.close()
    for history in (site.history, own_history):
        assert "secretive" in history.read_text()
        said.append(history.read_text())
    said.append(status)
    out, err = capfd.readouterr()
    said += [out, err, caplog.text, str(site.service.line), site.service.log()]
    ray_logs = [
        path
        for path in site.ray_directory().rglob("*")
        if path.is_file() and path.suffix in (".log", ".out", ".err")
    ]
    assert ray_logs
    said += [path.read_text(errors="replace") for path in ray_logs]
    said += [command_line(process) for process in site.service.family()]
    everything = "\n".join(said)
    assert "secretive" in everything, "what is searched is what was said"
    for secret in site.secrets():
        assert secret not in everything


def test_rays_own_authentication_is_on(site):
    environment = site.ray_environment()
    assert environment["RAY_AUTH_MODE"] == "token"
    with grpc.insecure_channel(site.gcs()) as channel:
        call = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetAllNodeInfo")
        with pytest.raises(grpc.RpcError) as caught:
            call(b"", timeout=10)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        with pytest.raises(grpc.RpcError) as caught:
            call(b"", timeout=10, metadata=(("authorization", f"Bearer {WRONG}"),))
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        own = (("authorization", f"Bearer {environment['RAY_AUTH_TOKEN']}"),)
        assert call(b"", timeout=10, metadata=own)


def test_no_port_of_rays_serves_who_has_no_token(site):
    """Whatever listens beside our own port, on whichever address, answers gRPC and HTTP with a refusal."""
    own = int(site.service.address.rpartition(":")[2])
    addresses = {(ip, port) for ip, port in listening(site.service.family()) if port != own}
    assert addresses
    methods = (
        "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
        "/ray.rpc.InternalKVGcsService/InternalKVKeys",
        "/ray.rpc.NodeManagerService/GetSystemConfig",
        "/ray.rpc.CoreWorkerService/GetCoreWorkerStats",
        "/ray.rpc.ObjectManagerService/Pull",
    )
    denied = 0
    for ip, port in addresses:
        host = "127.0.0.1" if ip in ("::", "0.0.0.0") else ip.removeprefix("::ffff:")
        with grpc.insecure_channel(f"{host}:{port}") as channel:
            codes = []
            for method in methods:
                with pytest.raises(grpc.RpcError) as caught:
                    channel.unary_unary(method)(b"", timeout=10)
                codes.append(caught.value.code())
        denied += grpc.StatusCode.UNAUTHENTICATED in codes
        if grpc.StatusCode.UNAUTHENTICATED not in codes:  # it speaks HTTP/1
            request = urllib.request.Request(
                f"http://{host}:{port}/get_or_create_runtime_env", b"", method="POST"
            )
            with pytest.raises(urllib.error.HTTPError) as refusal:
                urllib.request.urlopen(request, timeout=10)
            assert refusal.value.code in (401, 403)
    assert denied
