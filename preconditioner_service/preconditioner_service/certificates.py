"""A development authority with certificates of a server and a client: ``preconditioner-service certs``.

For trying TLS out and for tests. The authority's key lies beside what it signs, so a cluster that has an
authority of its own (cert-manager, step-ca, a company's) should use that one.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from preconditioner_service.files import write_new

_CLOCKS_DIFFER = datetime.timedelta(minutes=5)
_LONGEST_HOST = 253


class CertificateError(Exception):
    """Certificates cannot be made; the text names the file or value and the way out."""


@dataclass(frozen=True)
class CertificateFiles:
    """Where they lie in a directory; all are PEM, the keys for their owner's eyes alone (mode 0600)."""

    directory: Path

    @property
    def ca(self) -> Path:
        """Certificate of the authority: what clients trust, and the server where clients show one."""
        return self.directory / "ca.pem"

    @property
    def ca_key(self) -> Path:
        """The authority's key. Whoever has it can make certificates that all trust."""
        return self.directory / "ca.key"

    @property
    def server(self) -> Path:
        """Certificate of the server."""
        return self.directory / "server.pem"

    @property
    def server_key(self) -> Path:
        """The server's key."""
        return self.directory / "server.key"

    @property
    def client(self) -> Path:
        """Certificate of a client, for mutual TLS."""
        return self.directory / "client.pem"

    @property
    def client_key(self) -> Path:
        """The client's key."""
        return self.directory / "client.key"

    def all(self) -> tuple[Path, ...]:
        """Every one of them."""
        return self.ca, self.ca_key, self.server, self.server_key, self.client, self.client_key


def make_certificates(directory: Path, hosts: Sequence[str], days: float = 30.0) -> CertificateFiles:
    """Make a new authority, and let it sign a certificate of a server and one of a client.

    Args:
        directory: made, with mode 0700, if it is not there.
        hosts: DNS names (``*.example.org`` too) and IP addresses by which clients reach the server.
        days: validity of all of them.

    Raises:
        CertificateError: a host that is none, a file that is there already (nothing is overwritten), or a
            directory that cannot be written.
    """
    files = CertificateFiles(directory)
    names = [_general_name(host) for host in hosts]
    if not names:
        raise CertificateError("at least one host is needed: the name or address that clients connect to")
    if present := [path.name for path in files.all() if path.exists()]:
        raise CertificateError(
            f"{directory} holds {', '.join(present)} already, and nothing is overwritten: give a new "
            "directory"
        )
    ca_key, server_key, client_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))
    ca_name = _name("preconditioner development authority")
    ca = (
        _builder(ca_name, ca_name, ca_key.public_key(), ca_key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(authority=True), critical=True)
        .sign(ca_key, hashes.SHA256())
    )
    server = (
        _leaf(_name("preconditioner-service"), server_key, ca_name, ca_key, days)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    client = (
        _leaf(_name("preconditioner-client"), client_key, ca_name, ca_key, days)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path, key in (
            (files.ca_key, ca_key),
            (files.server_key, server_key),
            (files.client_key, client_key),
        ):
            write_new(path, _key_pem(key), 0o600)
        for path, certificate in ((files.ca, ca), (files.server, server), (files.client, client)):
            write_new(path, certificate.public_bytes(serialization.Encoding.PEM), 0o644)
    except OSError as error:
        raise CertificateError(f"{error.filename or directory}: {error.strerror}") from None
    return files


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host.strip("[]")))
    except ValueError:
        pass
    labels = host.removeprefix("*.").split(".")
    if len(host) > _LONGEST_HOST or not all(_is_label(label) for label in labels):
        raise CertificateError(
            f"host {host[:80]!r} is no DNS name and no IP address; give it without scheme and port, as in "
            "preconditioners.internal or 10.0.0.7"
        )
    return x509.DNSName(host)


def _is_label(label: str) -> bool:
    plain = label.replace("-", "").replace("_", "")
    return plain.isascii() and plain.isalnum() and len(label) <= 63 and label.strip("-") == label


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    issuer_key: ec.EllipticCurvePublicKey,
    days: float,
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.timezone.utc)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCKS_DIFFER)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
    )


def _leaf(
    subject: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    issuer: x509.Name,
    issuer_key: ec.EllipticCurvePrivateKey,
    days: float,
) -> x509.CertificateBuilder:
    return (
        _builder(subject, issuer, key.public_key(), issuer_key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(authority=False), critical=True)
    )


def _usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
