"""From what the user says of the service to the exchange that carries it."""

from __future__ import annotations

import inspect
import itertools
import os
import re
import socket

from preconditioner_client.exchange import Exchange
from preconditioner_client.recording import TrainerHistory
from preconditioner_client.service_config import ServiceConfig, check_job

_numbers = itertools.count()


def make_exchange(service: str | ServiceConfig | Exchange | None, job: str | None) -> tuple[Exchange, str]:
    """The exchange for a ``service`` argument, and the job's name.

    Args:
        service: an exchange as it is; otherwise see :meth:`ServiceConfig.resolve`.
        job: name at the service; default the config's, else one of this host, process and optimizer.

    Raises:
        TypeError: no service at all.
        ValueError: a setting, an address or a job's name that cannot be right.
        ExchangeError: the service could not be started, or refuses this trainer for good.
    """
    if job is not None:
        check_job(job)
    # To a protocol a class looks like its instances.
    if isinstance(service, Exchange) and not inspect.isclass(service):
        return service, _default_job() if job is None else job
    # Only now, so that an optimizer with an exchange of its own needs no gRPC.
    from preconditioner_client.service_exchange import ServiceExchange

    config = ServiceConfig.resolve(service)
    return ServiceExchange(config), job or config.job or _default_job()


def history_of(exchange: Exchange) -> TrainerHistory | None:
    """Where what happens is recorded, if it is."""
    history = getattr(exchange, "history", None)
    return history if isinstance(history, TrainerHistory) else None


def credit_of(exchange: Exchange) -> int:
    """Bytes that may have been sent here without receipt; 0 where nothing is sent."""
    return int(getattr(exchange, "credit_bytes", 0))


def newest_epoch(exchange: Exchange, job: str) -> int:
    """The largest epoch that an earlier life of the job had, as far as the service knows; else 0."""
    known = getattr(exchange, "newest_epoch", None)
    return 0 if known is None else int(known(job))


def _default_job() -> str:
    host = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())[:100]
    return f"{host}-{os.getpid()}-{next(_numbers)}"
