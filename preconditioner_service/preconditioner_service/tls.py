"""The server's TLS: certificate, key and, for mutual TLS, the authority of its clients, all reloadable."""

from __future__ import annotations

import datetime
import logging
import threading
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization

from preconditioner_service.files import FileError, read, warn_if_exposed
from preconditioner_service.logs import event
from preconditioner_service.reloading import Reloading


class ServerTls:
    """What TLS handshakes are made with. Connections that stand keep what they began with.

    Args:
        certificate: PEM chain of the server, its own certificate first.
        key: PEM private key, without a passphrase.
        client_ca: PEM roots that clients' certificates must lead to; ``None``: clients need none.

    Raises:
        FileError: a file cannot be read, is no PEM of its kind, the key is not the certificate's, or the
            certificate is out of date.
    """

    def __init__(self, certificate: Path, key: Path, client_ca: Path | None) -> None:
        warn_if_exposed(key)
        self._mutual = client_ca is not None
        paths = [certificate, key, *([] if client_ca is None else [client_ca])]
        self.reloading = Reloading("tls certificates", paths, lambda: load(certificate, key, client_ca))
        self._guard = threading.Lock()
        self._given = self.reloading.value

    def credentials(self) -> grpc.ServerCredentials:
        """For ``add_secure_port``."""
        return grpc.dynamic_ssl_server_credentials(
            self._given, self._fetch, require_client_authentication=self._mutual
        )

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC, in a thread of its own, before each handshake."""
        with self._guard:
            if self._given is self.reloading.value:
                return None
            self._given = self.reloading.value
            return self._given


def load(certificate: Path, key: Path, client_ca: Path | None) -> grpc.ServerCertificateConfiguration:
    """Read and check what a server's handshakes need.

    Raises:
        FileError: see :class:`ServerTls`.
    """
    chain_pem, key_pem = read(certificate, "tls_cert"), read(key, "tls_key")
    leaf = _certificates(chain_pem, "tls_cert", certificate)[0]
    try:
        fits = serialization.load_pem_private_key(key_pem, None).public_key() == leaf.public_key()
    except UnsupportedAlgorithm as error:
        raise FileError(f"tls_key {key} or tls_cert {certificate}: {error}; use RSA or ECDSA") from None
    except (ValueError, TypeError):  # a TypeError asks for a passphrase
        raise FileError(f"tls_key {key}: no PEM private key without a passphrase") from None
    if not fits:
        raise FileError(f"tls_key {key} is not the key of tls_cert {certificate}")
    if leaf.not_valid_after_utc <= datetime.datetime.now(datetime.timezone.utc):
        raise FileError(
            f"tls_cert {certificate} was valid until {leaf.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
        )
    roots = None
    if client_ca is not None:
        roots = read(client_ca, "tls_client_ca")
        _certificates(roots, "tls_client_ca", client_ca)
    event(
        logging.INFO,
        "certificate",
        subject=leaf.subject.rfc4514_string(),
        valid_until=leaf.not_valid_after_utc.isoformat(),
        sha256=leaf.fingerprint(hashes.SHA256()).hex(),
    )
    return grpc.ssl_server_certificate_configuration([(key_pem, chain_pem)], roots)


def _certificates(pem: bytes, what: str, path: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError:
        raise FileError(f"{what} {path}: no PEM certificate") from None
