"""Where the service is and how it is spoken to; one validated dataclass and the places it is read from."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import ipaddress
import json
import math
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from preconditioner_client.options import check_numbers
from preconditioner_protos.manifest import JOB_PATTERN

EMBEDDED = "embedded"
"""The address that stands for a private service, started as a subprocess."""

ADDRESS_VARIABLE = "PRECONDITIONER_SERVICE"
CONFIG_VARIABLE = "PRECONDITIONER_CLIENT_CONFIG"
_COMMON_PREFIX = "PRECONDITIONER_"
_PREFIX = "PRECONDITIONER_CLIENT_"
_PREFIXES_OF_OTHERS = ("PRECONDITIONER_SERVICE_", "PRECONDITIONER_WORKER_")
_SHORT_VARIABLES = {
    "address": ADDRESS_VARIABLE,
    "token": "PRECONDITIONER_TOKEN",
    "token_file": "PRECONDITIONER_TOKEN_FILE",
}
# What Kubernetes sets in every pod for a Service named preconditioner, or preconditioner-anything. A bare
# PORT is told from a setting by its value.
_SERVICE_LINK = re.compile(
    r"PRECONDITIONER(_\w+)?_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_SERVICE_LINK_URL = re.compile(r"(tcp|udp|sctp)://.*")


@dataclass(frozen=True, kw_only=True)
class ServiceConfig:
    """How a training process reaches the service.

    Attributes:
        address: ``"embedded"`` (a private service on loopback, started and ended with this process) or
            ``"host:port"``; an IPv6 address stands in brackets.
        token: bearer token. Never shown by ``repr``.
        token_file: file that holds the token; read again at every connection, so that a token may rotate.
        tls: speak TLS. Any of ``tls_ca``, ``tls_cert`` and ``tls_key`` implies it.
        tls_ca: PEM file of the certificate authorities to trust; None: those that gRPC ships.
        tls_cert: PEM file of this client's certificate chain, for mutual TLS.
        tls_key: PEM file of the certificate's key.
        allow_plaintext: permit an address off loopback without TLS: token and matrices can then be read,
            and altered, by anyone on the way.
        job: name under which the service knows this training job. None: the optimizer chooses.
        connect_timeout: seconds that one attempt to connect or to open a session may take.
        start_timeout: seconds that the embedded service may take to be ready.
        close_timeout: seconds that ending the session may take.
        workers: actors of the embedded service. None: it decides.
        outbox_bytes: bound of the snapshots that wait to be sent. None: as many as
            ``snapshots_in_flight`` of every block, which bounds them too. Equal blocks that were taken in one
            step share their memory, and give it back together.
        credit_bytes: packed preconditioners that the service may have under way without answer.
        history_file: append what happens to this file, for ``preconditioner-worker check-history``.
        history_matrices: folder to save snapshots and preconditioners to, so that a check can compute the
            roots again; needs ``history_file``.
    """

    address: str = EMBEDDED
    token: str | None = field(default=None, repr=False)
    token_file: str | None = None
    tls: bool = False
    tls_ca: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    allow_plaintext: bool = False
    job: str | None = None
    connect_timeout: float = 5.0
    start_timeout: float = 120.0
    close_timeout: float = 3.0
    workers: int | None = None
    outbox_bytes: int | None = None
    credit_bytes: int = 64 * 1024 * 1024
    history_file: str | None = None
    history_matrices: str | None = None

    def __post_init__(self) -> None:
        check_numbers(self)
        if any((self.tls_ca, self.tls_cert, self.tls_key)):
            object.__setattr__(self, "tls", True)
        if self.token is not None:
            check_token(self.token, "token")
        if self.token is not None and self.token_file is not None:
            raise ValueError("token and token_file exclude each other: give one")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("mutual TLS needs both tls_cert and tls_key")
        if self.job is not None:
            check_job(self.job)
        for name in ("connect_timeout", "start_timeout", "close_timeout"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be finite and > 0 seconds, not {value}")
        for name in ("workers", "outbox_bytes", "credit_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, not {value}")
        if self.history_matrices is not None and self.history_file is None:
            raise ValueError("history_matrices needs history_file, which names the matrices")
        if not self.embedded:
            self.check_address(self.address)

    @property
    def embedded(self) -> bool:
        """Whether the service is a private subprocess."""
        return self.address == EMBEDDED

    def check_address(self, address: str) -> None:
        """Refuse what cannot be dialled, and plaintext off loopback that nobody allowed.

        Raises:
            ValueError: with the value and the way out.
        """
        if not (is_loopback(address) or self.tls or self.allow_plaintext):
            raise ValueError(
                f"{address!r} is not on loopback and TLS is off: token and matrices would travel in the "
                f"clear. Set tls=True (with tls_ca for a private authority), or allow_plaintext=True if the "
                f"network is trusted"
            )

    def read_token(self) -> str | None:
        """The token as it is now; None if none was configured.

        Raises:
            ValueError: ``token_file`` cannot be read or holds no token; its content is not shown.
        """
        if self.token_file is None:
            return self.token
        try:
            text = Path(self.token_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not text"
            raise ValueError(f"token_file {self.token_file!r} cannot be read: {reason}") from None
        check_token(text, f"token_file {self.token_file!r}")
        return text

    @classmethod
    def resolve(
        cls, argument: str | ServiceConfig | None = None, environ: Mapping[str, str] | None = None
    ) -> ServiceConfig:
        """Settings from all their places; for each field the first of these that gives it holds.

        1. ``argument``: an address, or a ``ServiceConfig``, of which the fields that differ from their
           defaults count as given.
        2. The environment: ``PRECONDITIONER_SERVICE`` (address), ``PRECONDITIONER_TOKEN``,
           ``PRECONDITIONER_TOKEN_FILE``, and ``PRECONDITIONER_CLIENT_<FIELD>`` for the others, as in
           ``PRECONDITIONER_CLIENT_TLS_CA``.
        3. The TOML or JSON file that ``PRECONDITIONER_CLIENT_CONFIG`` names; its keys are the fields.
        4. The defaults.

        A token and a token file are one setting: the place that gives either hides both of later places.

        Args:
            argument: see above.
            environ: in place of ``os.environ``.

        Raises:
            ValueError: a key, variable or value that is not understood; named, with what is possible.
        """
        environ = os.environ if environ is None else environ
        if isinstance(argument, ServiceConfig):
            given = {
                f.name: getattr(argument, f.name)
                for f in dataclasses.fields(cls)
                if getattr(argument, f.name) != f.default
            }
        elif argument is None:
            given = {}
        elif isinstance(argument, str):
            given = {"address": argument}
        else:
            # Not the value, which may hold a token.
            raise TypeError(
                f'service must be "embedded", "host:port", a ServiceConfig or an Exchange, not '
                f"{type(argument).__name__}"
            )
        settings: dict[str, Any] = {}
        path = environ.get(CONFIG_VARIABLE)
        for place in (_read_file(path) if path else {}, _read_environment(environ), given):
            if "token" in place or "token_file" in place:
                settings.pop("token", None)
                settings.pop("token_file", None)
            settings.update(place)
        return cls(**settings)


def check_job(job: str) -> None:
    """Refuse what no job may be called.

    Raises:
        ValueError: with the name.
    """
    if not (isinstance(job, str) and JOB_PATTERN.fullmatch(job)):
        shown = job[:80] if isinstance(job, str) else job
        raise ValueError(f"job {shown!r} is not 1 to 200 characters of [A-Za-z0-9._-]")


def check_token(token: str, source: str) -> None:
    """Refuse what cannot stand in an HTTP header. The token itself never appears in the message.

    Raises:
        ValueError: naming ``source``.
    """
    if not token:
        raise ValueError(f"{source} holds an empty token")
    if not all("!" <= character <= "~" for character in token):
        raise ValueError(f"{source} holds white space or characters outside of ASCII, which no token has")


def _host_of(address: str) -> str:
    hint = 'give "embedded" or "host:port", as in "10.0.0.7:50051"'
    if not address:
        raise ValueError(f"the service's address is empty; {hint}")
    if "://" in address:
        raise ValueError(f"address {address!r} has a scheme; {hint}")
    host, colon, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not colon or not host or (":" in host and not bracketed):
        raise ValueError(f"address {address!r} has no port; {hint}")
    if not (port.isascii() and port.isdigit() and 1 <= int(port) <= 65535):
        raise ValueError(f"address {address!r} has the port {port!r}, which is not in 1 to 65535; {hint}")
    return host[1:-1] if bracketed else host


def is_loopback(address: str) -> bool:
    """Whether ``host:port`` never leaves this machine.

    Raises:
        ValueError: it is no such address.
    """
    host = _host_of(address)
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _parse_bool(text: str) -> bool:
    lowered = text.strip().lower()
    if lowered in ("1", "true", "yes", "on"):
        return True
    if lowered in ("0", "false", "no", "off"):
        return False
    raise ValueError("it is none of 1, true, yes, on, 0, false, no, off")


# Annotations are strings here (postponed evaluation), which is just what is needed to look types up by.
_TYPES: dict[str, tuple[type, Callable[[str], Any]]] = {
    "str": (str, str),
    "str | None": (str, str),
    "bool": (bool, _parse_bool),
    "float": (float, float),
    "int": (int, int),
    "int | None": (int, int),
}
_FIELDS = {f.name: _TYPES[str(f.type)] for f in dataclasses.fields(ServiceConfig)}


def _is_of_others(name: str, value: str) -> bool:
    """Whether a variable is another component's, or a service link of Kubernetes."""
    if _SERVICE_LINK.fullmatch(name) or (name.endswith("_PORT") and _SERVICE_LINK_URL.fullmatch(value)):
        return True
    return name.startswith(_PREFIXES_OF_OTHERS)


def _near(name: str, variables: Mapping[str, str]) -> list[str]:
    """Variables that a misspelt one may stand for.

    Args:
        name: the misspelt one.
        variables: by field.
    """
    # Without the prefix, which makes all of them alike.
    stem = name.removeprefix(_PREFIX).removeprefix(_COMMON_PREFIX).lower()
    return [variables[field] for field in difflib.get_close_matches(stem, variables, n=2, cutoff=0.7)]


def _read_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    names = {name: _SHORT_VARIABLES.get(name, _PREFIX + name.upper()) for name in _FIELDS}
    known = {CONFIG_VARIABLE, *names.values()}
    for name in sorted(environ):
        if name.startswith(_COMMON_PREFIX) and name not in known and not _is_of_others(name, environ[name]):
            near = _near(name, {**names, "service": ADDRESS_VARIABLE, "config": CONFIG_VARIABLE})
            hint = f". Was {' or '.join(near)} meant?" if near else ""
            raise ValueError(f"unknown variable {name}; known are {', '.join(sorted(known))}{hint}")
    settings: dict[str, Any] = {}
    for name, variable in names.items():
        text = environ.get(variable)
        if text is None:
            continue
        try:
            settings[name] = _FIELDS[name][1](text)
        except ValueError as error:
            raise ValueError(f"{variable}={text!r} is not valid: {error}") from None
    return settings


def _read_file(path: str) -> dict[str, Any]:
    where = f"{CONFIG_VARIABLE}={path!r}"
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{where} cannot be read: {error}") from None
    suffix = Path(path).suffix.lower()
    try:
        if suffix == ".json":
            settings = json.loads(text)
        elif suffix == ".toml":
            if sys.version_info < (3, 11):
                raise ValueError("TOML needs Python 3.11 or newer; use a .json file")
            settings = importlib.import_module("tomllib").loads(text)
        else:
            raise ValueError("the name must end in .toml or .json")
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{where} holds no table of settings")
    for key, value in settings.items():
        if key not in _FIELDS:
            raise ValueError(f"{where}: unknown key {key!r}; known are {', '.join(_FIELDS)}")
        wanted = _FIELDS[key][0]
        fits = isinstance(value, wanted) or (wanted is float and isinstance(value, int))
        if not fits or (isinstance(value, bool) and wanted is not bool):
            shown = "the value" if key == "token" else repr(value)
            raise ValueError(f"{where}: {key} must be of type {wanted.__name__}; {shown} is not")
    return settings
