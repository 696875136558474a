"""TLS and mutual TLS, and certificates that change while the service runs."""

from __future__ import annotations

import base64
import contextlib
import datetime
import logging
import shutil

import grpc
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from in_process_service import InProcessService
from preconditioner_client import ExchangeError, tls_probe
from preconditioner_client.connection import preflight
from preconditioner_client.service_config import ServiceConfig
from preconditioner_service import certificates, logs
from preconditioner_service.certificates import CertificateFiles, make_certificates
from preconditioner_service.files import FileError
from raw_trainer import manifest, open_request, statistics, wait_for

TOKEN = "hush-hush-hush"


@pytest.fixture(scope="module")
def authorities(tmp_path_factory):
    """Two, each with a server and a client."""
    directory = tmp_path_factory.mktemp("authorities")
    return [make_certificates(directory / name, ["localhost", "127.0.0.1"]) for name in "ab"]


@pytest.fixture
def events(caplog, monkeypatch):
    monkeypatch.setattr(logs.LOGGER, "propagate", True)
    caplog.set_level(logging.INFO, logger=logs.LOGGER.name)
    return lambda name: [record.fields for record in caplog.records if record.getMessage() == name]


class Installed:
    """The files that a service reads, which :meth:`put` replaces."""

    def __init__(self, directory, files: CertificateFiles) -> None:
        self.files = CertificateFiles(directory)
        self.put(files)

    def put(self, files: CertificateFiles, *names: str) -> None:
        for name in names or ("server.pem", "server.key", "ca.pem"):
            shutil.copy(files.directory / name, self.files.directory / f"{name}.new")
            (self.files.directory / f"{name}.new").rename(self.files.directory / name)


@pytest.fixture
def installed(tmp_path, authorities):
    return Installed(tmp_path, authorities[0])


@pytest.fixture
def serving():
    with contextlib.ExitStack() as stack:

        def start(installed: Installed, *, mutual: bool = False) -> InProcessService:
            files = installed.files
            options = {"tls_client_ca": files.ca} if mutual else {}
            service = InProcessService(
                token=TOKEN, tls_cert=files.server, tls_key=files.server_key, **options
            )
            stack.callback(service.stop)
            return service

        yield start


def trusting(authority: CertificateFiles, client: CertificateFiles | None = None) -> grpc.ChannelCredentials:
    if client is None:
        return grpc.ssl_channel_credentials(authority.ca.read_bytes())
    return grpc.ssl_channel_credentials(
        authority.ca.read_bytes(), client.client_key.read_bytes(), client.client.read_bytes()
    )


def reaches(service: InProcessService, credentials: grpc.ChannelCredentials | None) -> bool:
    trainer = service.trainer(TOKEN, credentials)
    try:
        return trainer.status().protocol_version_max == 1
    except grpc.RpcError:
        return False
    finally:
        trainer.channel.close()


def test_tls(serving, installed, authorities):
    service = serving(installed)
    a, b = authorities
    assert reaches(service, trusting(a))
    assert not reaches(service, None)
    assert not reaches(service, grpc.ssl_channel_credentials())
    assert not reaches(service, trusting(b))


def test_mutual_tls(serving, installed, authorities):
    service = serving(installed, mutual=True)
    a, b = authorities
    assert reaches(service, trusting(a, a))
    assert not reaches(service, trusting(a))
    assert not reaches(service, trusting(a, b))


def test_a_client_without_certificate_is_told_what_is_missing(serving, installed, authorities, monkeypatch):
    monkeypatch.setattr(tls_probe, "_LONGEST_WAIT", 30.0)
    service = serving(installed, mutual=True)
    address, files = f"localhost:{service.port}", authorities[0]
    with pytest.raises(ExchangeError, match="wants a certificate of this client: set tls_cert and tls_key"):
        preflight(ServiceConfig(address=address, token=TOKEN, tls_ca=str(files.ca)))
    of_another = {"tls_cert": str(authorities[1].client), "tls_key": str(authorities[1].client_key)}
    with pytest.raises(ExchangeError, match="does not accept the certificate of this client"):
        preflight(ServiceConfig(address=address, token=TOKEN, tls_ca=str(files.ca), **of_another))
    with pytest.raises(ExchangeError, match=r"certificate is not trusted .*tls_ca"):
        preflight(ServiceConfig(address=address, token=TOKEN, tls_ca=str(authorities[1].ca)))
    own = {"tls_cert": str(files.client), "tls_key": str(files.client_key)}
    assert preflight(ServiceConfig(address=address, token=TOKEN, tls_ca=str(files.ca), **own))


def test_a_new_certificate_holds_for_new_connections_and_a_live_stream_goes_on(
    serving, installed, authorities
):
    """Under another authority, for clients too."""
    service = serving(installed, mutual=True)
    a, b = authorities
    trainer = service.trainer(TOKEN, trusting(a, a))
    trainer.open(open_request("job", manifest((4,))))
    stream = trainer.attach()
    installed.put(b)
    wait_for(lambda: reaches(service, trusting(b, b)))
    assert not reaches(service, trusting(a, a))
    assert not reaches(service, trusting(b, a))
    assert not reaches(service, trusting(b))
    stream.snapshot(0, 1, statistics(4))
    stream.until(lambda: stream.receipts == [(0, 1)])
    assert trainer.status().jobs[0].snapshots_received == 1
    assert not stream.ended
    trainer.channel.close()


def test_a_pair_that_is_not_whole_changes_nothing_and_is_told_once(serving, installed, authorities, events):
    service = serving(installed)
    a, b = authorities
    installed.put(b, "server.pem")
    wait_for(lambda: events("not reloaded"))
    assert reaches(service, trusting(a))
    (told,) = events("not reloaded")
    assert "server.key is not the key of tls_cert" in str(told["reason"])
    half = b.server_key.read_bytes()[:100]
    installed.files.server_key.write_bytes(half)
    wait_for(lambda: len(events("not reloaded")) == 2)
    assert reaches(service, trusting(a))
    assert half.decode() not in str(events("not reloaded"))
    installed.put(b)
    wait_for(lambda: events("reloaded"))
    assert reaches(service, trusting(b))
    assert len(events("not reloaded")) == 2


def expired(directory, monkeypatch) -> CertificateFiles:
    monkeypatch.setattr(certificates, "_CLOCKS_DIFFER", datetime.timedelta(days=9))
    return make_certificates(directory, ["localhost"], days=-1)


def of_an_unknown_curve() -> bytes:
    """A key that is well-formed: SM2's number stands in the place of P-256's."""
    kinds = serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    key = ec.generate_private_key(ec.SECP256R1()).private_bytes(*kinds)
    p256, sm2 = bytes.fromhex("2a8648ce3d030107"), bytes.fromhex("2a811ccf5501822d")
    assert p256 in key
    text = base64.encodebytes(key.replace(p256, sm2)).decode()
    return f"-----BEGIN PRIVATE KEY-----\n{text}-----END PRIVATE KEY-----\n".encode()


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("server.pem", None, r"tls_cert .*server\.pem: No such file"),
        ("server.pem", b"nonsense", r"tls_cert .*server\.pem: no PEM certificate"),
        ("server.key", b"nonsense", r"tls_key .*server\.key: no PEM private key without a passphrase"),
        ("server.key", of_an_unknown_curve(), r"tls_key .*server\.key .*use RSA or ECDSA"),
        ("ca.pem", b"", r"tls_client_ca .*ca\.pem: no PEM certificate"),
    ],
)
def test_files_that_are_no_good_are_named_at_the_start(serving, installed, name, content, why):
    path = installed.files.directory / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FileError, match=why):
        serving(installed, mutual=True)


def test_a_certificate_that_is_out_of_date_is_named_at_the_start(serving, tmp_path, monkeypatch):
    (tmp_path / "installed").mkdir()
    with pytest.raises(FileError, match=r"tls_cert .* was valid until 20"):
        serving(Installed(tmp_path / "installed", expired(tmp_path / "expired", monkeypatch)))
