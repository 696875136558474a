"""The development authority and what it signs."""

from __future__ import annotations

import datetime
import ipaddress

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.verification import PolicyBuilder, Store

from preconditioner_service.certificates import CertificateError, make_certificates


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("certs") / "new"
    return make_certificates(directory, ["service.example", "*.pods.example", "10.0.0.7", "[::1]"], days=3)


def load(path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_verifiers_accept_the_chains(files):
    """The strict one of cryptography, which holds certificates to the rules of the web."""
    store = PolicyBuilder().store(Store([load(files.ca)]))
    for name in (
        x509.DNSName("service.example"),
        x509.DNSName("a.pods.example"),
        x509.IPAddress(ipaddress.ip_address("10.0.0.7")),
        x509.IPAddress(ipaddress.ip_address("::1")),
    ):
        store.build_server_verifier(name).verify(load(files.server), [])
    with pytest.raises(x509.verification.VerificationError):
        store.build_server_verifier(x509.DNSName("other.example")).verify(load(files.server), [])
    with pytest.raises(x509.verification.VerificationError):
        store.build_server_verifier(x509.DNSName("service.example")).verify(load(files.client), [])


def test_they_are_short_lived_and_belong_to_their_keys(files):
    for path, key_path in (
        (files.ca, files.ca_key),
        (files.server, files.server_key),
        (files.client, files.client_key),
    ):
        certificate = load(path)
        left = certificate.not_valid_after_utc - datetime.datetime.now(datetime.timezone.utc)
        assert datetime.timedelta(days=2.9) < left <= datetime.timedelta(days=3)
        key = serialization.load_pem_private_key(key_path.read_bytes(), None)
        assert key.public_key() == certificate.public_key()
        assert key_path.stat().st_mode & 0o777 == 0o600
    assert files.directory.stat().st_mode & 0o777 == 0o700


def test_the_authority_signs_no_authorities(files):
    constraints = load(files.ca).extensions.get_extension_for_class(x509.BasicConstraints).value
    assert (constraints.ca, constraints.path_length) == (True, 0)
    assert not load(files.server).extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_nothing_is_overwritten(files, tmp_path):
    before = files.server_key.read_bytes()
    with pytest.raises(CertificateError, match=r"holds ca\.pem, .*nothing is overwritten"):
        make_certificates(files.directory, ["localhost"])
    assert files.server_key.read_bytes() == before
    (tmp_path / "client.key").write_text("mine")
    with pytest.raises(CertificateError, match=r"holds client\.key already"):
        make_certificates(tmp_path, ["localhost"])
    assert [path.name for path in tmp_path.iterdir()] == ["client.key"]


@pytest.mark.parametrize("host", ["", "http://x", "x:50051", "a b", "a..b", "-a", "*", "é.example", "a" * 64])
def test_hosts_that_are_none(tmp_path, host):
    with pytest.raises(CertificateError, match="is no DNS name and no IP address"):
        make_certificates(tmp_path, [host])
    assert not list(tmp_path.iterdir())


def test_a_host_is_needed(tmp_path):
    with pytest.raises(CertificateError, match="at least one host"):
        make_certificates(tmp_path, [])
