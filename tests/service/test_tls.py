"""TLS and mutual TLS, without a pool: a call that needs no worker."""

from __future__ import annotations

import asyncio
import io
import shutil
import subprocess

import grpc
import pytest

from preconditioner_protos.v1 import preconditioner_pb2 as pb
from preconditioner_protos.v1 import preconditioner_pb2_grpc as pb_grpc
from preconditioner_service import serve
from preconditioner_service.settings import ServeSettings

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")


@pytest.fixture(scope="module")
def identity(tmp_path_factory):
    """A self-signed certificate, which is its own root."""
    directory = tmp_path_factory.mktemp("tls")
    key, certificate = directory / "key.pem", directory / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    command += ["-nodes", "-keyout", key, "-out", certificate, "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run(command, check=True, capture_output=True)
    return key, certificate


def status(settings: ServeSettings, credentials: grpc.ChannelCredentials | None) -> pb.GetStatusResponse:
    async def call():
        run = serve._Run(settings, io.StringIO())
        server = run._server()
        address = run._listen(server)
        await server.start()
        try:
            channel = (
                grpc.aio.insecure_channel(address)
                if credentials is None
                else grpc.aio.secure_channel(address, credentials)
            )
            async with channel:
                stub = pb_grpc.PreconditionerServiceStub(channel)
                metadata = (("authorization", "Bearer hush"),)
                return await stub.GetStatus(pb.GetStatusRequest(), metadata=metadata, timeout=10)
        finally:
            await server.stop(None)

    return asyncio.run(call())


def test_tls(identity):
    key, certificate = identity
    settings = ServeSettings(token="hush", tls_cert=certificate, tls_key=key)
    trusted = grpc.ssl_channel_credentials(certificate.read_bytes())
    assert status(settings, trusted).protocol_version_max == 1
    for untrusted in (None, grpc.ssl_channel_credentials()):
        with pytest.raises(grpc.RpcError) as caught:
            status(settings, untrusted)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_mutual_tls(identity):
    key, certificate = identity
    settings = ServeSettings(token="hush", tls_cert=certificate, tls_key=key, tls_client_ca=certificate)
    root = certificate.read_bytes()
    known = grpc.ssl_channel_credentials(root, key.read_bytes(), root)
    assert status(settings, known).protocol_version_max == 1
    with pytest.raises(grpc.RpcError) as caught:
        status(settings, grpc.ssl_channel_credentials(root))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_files_that_are_not_there(identity, tmp_path):
    key, _ = identity
    settings = ServeSettings(token="hush", tls_cert=tmp_path / "nowhere.pem", tls_key=key)
    with pytest.raises(serve.ServeError, match=r"nowhere\.pem"):
        status(settings, None)
