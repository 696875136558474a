"""From what the user says of the service to the exchange that carries it."""

from __future__ import annotations

import contextlib
import gc
import inspect
import itertools
import os
import re
import socket
import weakref

from preconditioner_client.exchange import Exchange
from preconditioner_client.recording import TrainerHistory
from preconditioner_client.service_config import ServiceConfig, check_job

_numbers = itertools.count()
_holders: weakref.WeakKeyDictionary[Exchange, weakref.ref[object]] = weakref.WeakKeyDictionary()
"""What has opened a session through each exchange."""


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


def hold(exchange: Exchange, holder: object) -> None:
    """Keep an exchange for one optimizer, until :func:`let_go` or until that one is no more.

    Two would take each other's answers, since blocks have the same numbers in both.

    Args:
        exchange: before a session is opened through it.
        holder: the optimizer's part that opens it.

    Raises:
        ValueError: another holder has it.
    """
    try:
        other = _holder_of(exchange)
    except TypeError:  # a user's own may have neither a hash nor weak references
        return
    if other is not None and other is not holder:
        # An optimizer that nothing needs any more may wait for the collector.
        del other
        gc.collect()
        if _holder_of(exchange) is not None:
            raise ValueError(
                f"this {type(exchange).__name__} serves another optimizer, whose answers would be mixed with "
                f"this one's: give each optimizer an exchange of its own, or close() (detach()) the other "
                f"one before"
            )
    _holders[exchange] = weakref.ref(holder)


def let_go(exchange: Exchange, holder: object) -> None:
    """The end of :func:`hold`; nothing where another one holds it."""
    with contextlib.suppress(TypeError):
        if _holder_of(exchange) is holder:
            del _holders[exchange]


def _holder_of(exchange: Exchange) -> object | None:
    known = _holders.get(exchange)
    return None if known is None else known()


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
