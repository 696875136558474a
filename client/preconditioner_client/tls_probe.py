"""Why two ends do not understand each other, if it is TLS.

gRPC says little of a failed handshake, and of a server that refuses a client's certificate nothing at all: in
TLS 1.3 the client has finished its handshake by then and only sees the connection end. One more connection,
with Python's own TLS, tells what is wrong. Nothing is sent over it.
"""

from __future__ import annotations

import socket
import ssl

from preconditioner_client.service_config import ServiceConfig

_LONGEST_WAIT = 1.0


def why_no_tls(config: ServiceConfig) -> str | None:
    """What a person has to change, as a whole sentence; ``None`` if it is not TLS that fails.

    Blocks for at most about two seconds.
    """
    address = config.address
    if not config.tls:
        met = _shakes_hands(config, _indifferent())
        if met is None or isinstance(met, _RefusedError):
            return f"the service at {address} speaks TLS: set tls=True, and tls_ca for a private authority"
        return None
    try:
        context = ssl.create_default_context(cafile=config.tls_ca)
        if config.tls_cert is not None:
            context.load_cert_chain(config.tls_cert, config.tls_key)
    except OSError as error:  # ssl.SSLError is one
        return f"tls_ca, tls_cert or tls_key cannot be used: {error}"
    met = _shakes_hands(config, context)
    if isinstance(met, ssl.SSLCertVerificationError):
        return (
            f"no TLS connection with {address}: its certificate is not trusted for this name "
            f"({met.verify_message}); set tls_ca to the authority that signed it"
        )
    refused = isinstance(met, ssl.SSLError) and "ALERT" in (met.reason or "")
    if refused or isinstance(met, _RefusedError):
        if config.tls_cert is None:
            return (
                f"no TLS connection with {address}: it wants a certificate of this client: set tls_cert and "
                "tls_key"
            )
        return (
            f"no TLS connection with {address}: it does not accept the certificate of this client "
            f"({config.tls_cert}); use one of the authority that it trusts, and valid today"
        )
    if isinstance(met, ssl.SSLError):
        return f"no TLS connection with {address} ({met.reason}): the service speaks plaintext"
    return None


class _RefusedError(Exception):
    """The other end hung up after the handshake instead of greeting, as a gRPC server does at once."""


def _indifferent() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # only asks whether TLS is spoken
    return context


def _shakes_hands(config: ServiceConfig, context: ssl.SSLContext) -> Exception | None:
    """The error that a handshake, and the wait for the first byte behind it, meets."""
    host, _, port = config.address.rpartition(":")
    host = host.strip("[]")
    context.set_alpn_protocols(["h2"])
    timeout = min(_LONGEST_WAIT, config.connect_timeout)
    try:
        with (
            socket.create_connection((host, int(port)), timeout=timeout) as plain,
            context.wrap_socket(plain, server_hostname=host) as secure,
        ):
            try:
                greeting = secure.recv(1)
            except (ConnectionError, ssl.SSLEOFError):
                greeting = b""
            return None if greeting else _RefusedError()
    except (OSError, ValueError) as error:
        return error
