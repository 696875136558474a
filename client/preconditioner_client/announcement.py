"""What a trainer announces of a session, and the answer that it can work with."""

from __future__ import annotations

from importlib import metadata as distribution

from preconditioner_client.config import Ridge, RidgeKind
from preconditioner_client.exchange import ExchangeError, SessionSpec
from preconditioner_protos import PROTOCOL_VERSION, check_open_request
from preconditioner_protos.manifest import MAX_NAME_BYTES
from preconditioner_protos.v1 import preconditioner_pb2 as pb

_RIDGE_KINDS = {
    RidgeKind.RELATIVE: pb.RIDGE_KIND_RELATIVE,
    RidgeKind.ABSOLUTE: pb.RIDGE_KIND_ABSOLUTE,
    RidgeKind.TRACE: pb.RIDGE_KIND_TRACE,
    RidgeKind.PSEUDO_INVERSE: pb.RIDGE_KIND_PSEUDO_INVERSE,
}


def open_request(spec: SessionSpec) -> pb.OpenSessionRequest:
    """What announces a session.

    Raises:
        ManifestError: the session contradicts the protocol; a ValueError that names field and value.
    """
    blocks = [
        pb.Block(
            name=block.name.encode()[:MAX_NAME_BYTES].decode(errors="ignore"),
            sides=[
                pb.Side(length=n, root_order=p) for n, p in zip(block.sides, block.root_orders, strict=True)
            ],
            ridge=_ridge(block.ridge),
        )
        for block in spec.blocks
    ]
    request = pb.OpenSessionRequest(
        protocol_version=PROTOCOL_VERSION,
        job=spec.job,
        rank=spec.rank,
        world_size=spec.world_size,
        epoch=spec.epoch,
        manifest=pb.Manifest(
            blocks=blocks,
            statistics_dtype=pb.DTYPE_FLOAT32,
            preconditioner_dtype=pb.DTYPE_FLOAT32,
            snapshots_in_flight=spec.snapshots_in_flight,
        ),
        max_staleness=spec.max_staleness,
        client=_client_name(),
    )
    check_open_request(request)
    return request


def check_opened(opened: pb.OpenSessionResponse, address: str) -> None:
    """Hold the service's answer against what this client can do.

    Raises:
        ExchangeError: another protocol version, or a placement over several fronts.
    """
    if opened.protocol_version != PROTOCOL_VERSION:
        raise ExchangeError(
            f"the preconditioner service at {address} answers in protocol version {opened.protocol_version}, "
            f"this client speaks {PROTOCOL_VERSION}: install versions of async-preconditioner that agree"
        )
    fronts = [front.address or address for front in opened.placement.fronts]
    if len(fronts) > 1:
        raise ExchangeError(
            f"the preconditioner service at {address} places the blocks on {len(fronts)} fronts "
            f"({', '.join(fronts[:4])}{', ...' if len(fronts) > 4 else ''}), and this client speaks to one: "
            f"let the service run with one front, or install a client that speaks to several"
        )


def _ridge(ridge: Ridge) -> pb.Ridge:
    return pb.Ridge(kind=_RIDGE_KINDS[ridge.kind], value=ridge.value)


def _client_name() -> str:
    try:
        return f"preconditioner_client {distribution.version('async-preconditioner')}"
    except distribution.PackageNotFoundError:
        return "preconditioner_client"
