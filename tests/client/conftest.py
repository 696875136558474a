from __future__ import annotations

from dataclasses import dataclass

import pytest

from accelerators import ACCELERATORS, accelerator_named
from distributed_ranks import run_ranks
from fake_front import FakeFront
from preconditioner_client import supervisor, tls_probe
from preconditioner_client.service_config import ServiceConfig
from preconditioner_client.service_exchange import ServiceExchange
from preconditioner_client.supervisor import Supervisor
from preconditioner_service.certificates import make_certificates


@pytest.fixture
def front():
    front = FakeFront()
    yield front
    front.stop()


@pytest.fixture
def connect(monkeypatch):
    """Makes exchanges that are closed at the end."""
    monkeypatch.setattr(Supervisor, "REFUSED_PAUSE", 0.1)
    # Fronts of this process answer, but may get no time to for a second.
    monkeypatch.setattr(supervisor, "_CLOSE_SESSION_SECONDS", 30.0)
    monkeypatch.setattr(tls_probe, "_LONGEST_WAIT", 30.0)
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
    """Key and certificate of a server on localhost, and the file of their authority."""

    key: bytes
    chain: bytes
    path: str


@pytest.fixture(scope="session")
def certificates(tmp_path_factory) -> Certificates:
    files = make_certificates(tmp_path_factory.mktemp("tls"), ["localhost", "127.0.0.1"])
    return Certificates(files.server_key.read_bytes(), files.server.read_bytes(), str(files.ca))


@pytest.fixture(params=ACCELERATORS)
def accelerator(request):
    """A pretended one, and where there is one a real one, too."""
    with accelerator_named(request.param) as accelerator:
        yield accelerator


@pytest.fixture
def pretended():
    """The pretended accelerator, where the test looks into it."""
    with accelerator_named("pretended") as accelerator:
        yield accelerator


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """That all ranks of a module share."""
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def two(request, folder):
    """Two ranks that have run what ``TWO`` of the test's module names of the scenarios in its ``MODULE``."""
    return run_ranks(request.module.MODULE, 2, folder, *request.module.TWO)


@pytest.fixture(scope="module")
def four(request, folder, two):
    """Four ranks and ``FOUR``, some of whose scenarios read what two ranks have saved."""
    return run_ranks(request.module.MODULE, 4, folder, *request.module.FOUR)
