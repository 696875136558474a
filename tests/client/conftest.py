from __future__ import annotations

import shlex
import shutil
import subprocess
from dataclasses import dataclass

import pytest

from fake_front import FakeFront
from preconditioner_client.service_config import ServiceConfig
from preconditioner_client.service_exchange import ServiceExchange
from preconditioner_client.supervisor import Supervisor


@pytest.fixture
def front():
    front = FakeFront()
    yield front
    front.stop()


@pytest.fixture
def connect(monkeypatch):
    """Makes exchanges that are closed at the end."""
    monkeypatch.setattr(Supervisor, "REFUSED_PAUSE", 0.1)
    made: list[ServiceExchange] = []

    def make(address: str, **settings) -> ServiceExchange:
        exchange = ServiceExchange(ServiceConfig(address=address, **settings))
        made.append(exchange)
        return exchange

    yield make
    for exchange in made:
        exchange.close()


@dataclass(frozen=True)
class Certificates:
    """A self-signed certificate for localhost."""

    key: bytes
    chain: bytes
    path: str


@pytest.fixture(scope="session")
def certificates(tmp_path_factory) -> Certificates:
    if (openssl := shutil.which("openssl")) is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("tls")
    key, chain = folder / "key.pem", folder / "chain.pem"
    options = shlex.split("req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2")
    options += ["-subj", "/CN=localhost"]
    options += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    options += ["-keyout", str(key), "-out", str(chain)]
    subprocess.run([openssl, *options], check=True, capture_output=True)
    return Certificates(key.read_bytes(), chain.read_bytes(), str(chain))
