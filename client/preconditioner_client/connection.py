"""gRPC channels to the service: how they are made, what their errors mean, and the first look at a service.

Importing gRPC opens nothing; a channel is made in the process and thread that use it. A forked child keeps
the channels of its parent untouched for as long as it lives, since tearing them down would need threads that
were not forked with it. gRPC's own handlers of forks are off for the same reason, see the package.
"""

from __future__ import annotations

import ctypes
import enum
import logging
import os
import re
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from preconditioner_client.exchange import ExchangeError
from preconditioner_client.service_config import ServiceConfig, is_loopback
from preconditioner_client.tls_probe import why_no_tls
from preconditioner_protos import MAX_MESSAGE_BYTES, PROTOCOL_VERSION
from preconditioner_protos.v1 import preconditioner_pb2 as pb
from preconditioner_protos.v1 import preconditioner_pb2_grpc as rpc

logger = logging.getLogger("preconditioner_client")

Metadata = Sequence[tuple[str, str]]

_OPTIONS: tuple[tuple[str, int], ...] = (
    # A frozen or vanished service is noticed within half a minute, also while nothing is to be sent.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # Of the pings that measure the bandwidth; while one is out no keepalive is sent, and gRPC's own is 60 s.
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # Channels share nothing, so that a new one tries at once and does not inherit an old one's backoff.
    ("grpc.use_local_subchannel_pool", 1),
    # The service is the only one that answers for its state: gRPC repeats nothing by itself.
    ("grpc.enable_retries", 0),
)

_QUOTA = re.compile(r"\((max_\w+)\)")
_WAYS_OUT = {
    "max_sessions": "train with fewer ranks, end another session of the job, or have max_sessions raised",
    "max_jobs": "end another of these jobs, wait until one has ended, or have max_jobs raised",
    "max_blocks": (
        "cut the parameters into fewer blocks (a larger block_size, or a smaller max_side, beyond which a "
        "dimension is not preconditioned), or have max_blocks raised"
    ),
    "max_side": "cut the parameters into smaller blocks (a smaller block_size), or have max_side raised",
    "max_job_bytes": (
        "send less (a smaller max_side, beyond which a dimension is not preconditioned, or a shorter delay), "
        "end another session of the job, or have max_job_bytes raised"
    ),
}
"""By the quota that the details of RESOURCE_EXHAUSTED name in brackets."""

_channels: weakref.WeakSet[grpc.Channel] = weakref.WeakSet()


def _keep_channels_of_parent() -> None:
    for channel in list(_channels):
        # One reference that is never given back: no finalizer of it ever runs in the child.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(channel))
    _channels.clear()


os.register_at_fork(after_in_child=_keep_channels_of_parent)


def open_channel(
    config: ServiceConfig, address: str, max_receive_bytes: int = MAX_MESSAGE_BYTES
) -> grpc.Channel:
    """A new channel; it connects with its first call. TLS files are read again each time.

    Raises:
        ValueError: the address or a TLS file is not usable.
    """
    config.check_address(address)
    options = [*_OPTIONS, ("grpc.max_receive_message_length", max_receive_bytes)]
    if is_loopback(address):
        # A proxy (http_proxy), which gRPC otherwise asks for every address, cannot reach this machine.
        options.append(("grpc.enable_http_proxy", 0))
    if config.tls:
        credentials = grpc.ssl_channel_credentials(
            root_certificates=_read(config.tls_ca, "tls_ca"),
            private_key=_read(config.tls_key, "tls_key"),
            certificate_chain=_read(config.tls_cert, "tls_cert"),
        )
        channel = grpc.secure_channel(address, credentials, options)
    else:
        channel = grpc.insecure_channel(address, options)
    _channels.add(channel)
    return channel


def call_metadata(token: str | None) -> Metadata:
    """The metadata of every call."""
    return () if token is None else (("authorization", f"Bearer {token}"),)


def stub(channel: grpc.Channel) -> rpc.PreconditionerServiceStub:
    """The service's calls on a channel."""
    return rpc.PreconditionerServiceStub(channel)  # type: ignore[no-untyped-call]


class Outcome(enum.Enum):
    """What a failed call asks for."""

    RETRY = "retry"
    """Not there at the moment: try again after a short pause."""
    REOPEN = "reopen"
    """The session is lost: open it again."""
    REFUSED = "refused"
    """Wrong as configured: only a person can help, or a rotated token."""
    SUPERSEDED = "superseded"
    """Another trainer took over: never come back with this epoch."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A failed call.

    Attributes:
        outcome: what to do.
        message: for people: what was refused, and the way out.
    """

    outcome: Outcome
    message: str


def explain(error: Any, address: str, *, job: str = "", attaching: bool = False) -> Failure:
    """What a ``grpc.RpcError`` means by the protocol's section ERRORS.

    Args:
        error: the error; typed loosely, as gRPC's own type promises neither code nor details.
        address: where the call went.
        job: the job of the session.
        attaching: the call was an ``Exchange``, and not a unary one.
    """
    code, details = error.code(), error.details() or "no details"
    where = f"the preconditioner service at {address}"
    final = Outcome.REFUSED
    status = grpc.StatusCode
    if code is status.FAILED_PRECONDITION and attaching:
        return Failure(Outcome.REOPEN, f"{where} does not know the session any more: {details}")
    if code is status.ABORTED:
        return Failure(
            Outcome.SUPERSEDED,
            f"job {job!r} was taken over at {where} by a newer trainer ({details}); this one gets no more "
            f"preconditioners. End one of the two, or give each a job name of its own",
        )
    if code is status.UNAUTHENTICATED:
        return Failure(
            final,
            f"{where} refuses the token ({details}): set PRECONDITIONER_TOKEN, PRECONDITIONER_TOKEN_FILE or "
            f"ServiceConfig(token=...) to the token of the service",
        )
    if code is status.PERMISSION_DENIED:
        return Failure(
            final,
            f"{where}: the token does not open job {job!r} ({details}); use that job's token",
        )
    if code is status.FAILED_PRECONDITION:
        return Failure(
            final,
            f"{where} does not speak protocol version {PROTOCOL_VERSION} of this client ({details}): install "
            f"versions of async-preconditioner that agree",
        )
    if code is status.INVALID_ARGUMENT:
        return Failure(final, f"{where} refuses the session as invalid: {details}")
    if code is status.RESOURCE_EXHAUSTED:
        return Failure(
            final,
            f"{where} has no room for the session ({details}): {_way_out(details)}",
        )
    if code is status.UNIMPLEMENTED:
        return Failure(final, f"what listens at {address} is no preconditioner service ({details})")
    return Failure(Outcome.RETRY, f"{where}: {code.name if code else 'unknown error'}: {details}")


def _way_out(details: str) -> str:
    """What helps against a quota."""
    quotas = _QUOTA.findall(details)  # the last, since a block's name may come before
    return _WAYS_OUT.get(
        quotas[-1] if quotas else "",
        "wait until other jobs have ended, have its quota raised, or send less (a smaller max_side)",
    )


def check_version(status: pb.GetStatusResponse, address: str) -> None:
    """Hold the versions that a service speaks against ours.

    Raises:
        ExchangeError: ours is not among them.
    """
    if not status.protocol_version_min <= PROTOCOL_VERSION <= status.protocol_version_max:
        raise ExchangeError(
            f"the preconditioner service at {address} (version {status.service_version or 'unknown'}) speaks "
            f"protocol versions {status.protocol_version_min} to {status.protocol_version_max}, this client "
            f"{PROTOCOL_VERSION}: install versions of async-preconditioner that agree"
        )


def preflight(config: ServiceConfig) -> pb.GetStatusResponse | None:
    """Look whether the configured service is there and would take us, before the training begins.

    Blocks for at most about ``config.connect_timeout``, and holds nothing open afterwards.

    Returns:
        The service's answer; None, with one warning logged, if it cannot be reached now.

    Raises:
        ExchangeError: wrong token, wrong protocol version, TLS on one side only, not such a service at all.
        ValueError: the token file or a TLS file cannot be read.
    """
    with open_channel(config, config.address) as channel:
        try:
            status: pb.GetStatusResponse = stub(channel).GetStatus(
                pb.GetStatusRequest(),
                timeout=config.connect_timeout,
                metadata=call_metadata(config.read_token()),
                # Waiting lets a service that is about to listen be found, but hides why it is not reached.
                wait_for_ready=False,
            )
        except grpc.RpcError as error:
            failure = explain(error, config.address)
            if failure.outcome is not Outcome.RETRY:
                raise ExchangeError(failure.message) from None
            if (mismatch := why_no_tls(config)) is not None:
                raise ExchangeError(mismatch) from None
            warn_unreachable(failure.message)
            return None
    check_version(status, config.address)
    return status


def warn_unreachable(reason: str) -> None:
    """The one warning about a service that is not there."""
    logger.warning(
        "%s. Training goes on with the preconditioners that it has, and with the grafted diagonal update "
        "where there is none; the connection is tried again in the background.",
        reason,
    )


def warn_in_vain(was_connected: bool) -> None:
    """The one warning, at the end, about a training that no preconditioner ever reached."""
    logger.warning(
        "training ended before the preconditioner service %s: blocks had no preconditioner, but for those of "
        "a checkpoint, and made the steps of the grafted diagonal method. Train longer, start the service "
        "before the training (preconditioner-service serve, and service='host:port'), or let steps wait for "
        "it: StalenessConfig(adoption='scheduled', refresh_every=..., delay=...)",
        "had sent a preconditioner that was used" if was_connected else "was ready or could be reached",
    )


def _read(path: str | None, name: str) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{name} {path!r} cannot be read: {error.strerror}") from None
