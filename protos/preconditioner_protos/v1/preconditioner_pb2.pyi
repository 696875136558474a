from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[DType]
    DTYPE_FLOAT32: _ClassVar[DType]
    DTYPE_FLOAT64: _ClassVar[DType]

class RidgeKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RIDGE_KIND_UNSPECIFIED: _ClassVar[RidgeKind]
    RIDGE_KIND_RELATIVE: _ClassVar[RidgeKind]
    RIDGE_KIND_ABSOLUTE: _ClassVar[RidgeKind]
    RIDGE_KIND_TRACE: _ClassVar[RidgeKind]
    RIDGE_KIND_PSEUDO_INVERSE: _ClassVar[RidgeKind]

class NackReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    NACK_REASON_UNSPECIFIED: _ClassVar[NackReason]
    NACK_REASON_MALFORMED: _ClassVar[NackReason]
    NACK_REASON_CHECKSUM: _ClassVar[NackReason]
    NACK_REASON_OUTDATED: _ClassVar[NackReason]
    NACK_REASON_NOT_FINITE: _ClassVar[NackReason]
    NACK_REASON_INDEFINITE: _ClassVar[NackReason]
    NACK_REASON_ROOT_FAILED: _ClassVar[NackReason]
    NACK_REASON_WORKER_LOST: _ClassVar[NackReason]
DTYPE_UNSPECIFIED: DType
DTYPE_FLOAT32: DType
DTYPE_FLOAT64: DType
RIDGE_KIND_UNSPECIFIED: RidgeKind
RIDGE_KIND_RELATIVE: RidgeKind
RIDGE_KIND_ABSOLUTE: RidgeKind
RIDGE_KIND_TRACE: RidgeKind
RIDGE_KIND_PSEUDO_INVERSE: RidgeKind
NACK_REASON_UNSPECIFIED: NackReason
NACK_REASON_MALFORMED: NackReason
NACK_REASON_CHECKSUM: NackReason
NACK_REASON_OUTDATED: NackReason
NACK_REASON_NOT_FINITE: NackReason
NACK_REASON_INDEFINITE: NackReason
NACK_REASON_ROOT_FAILED: NackReason
NACK_REASON_WORKER_LOST: NackReason

class Ridge(_message.Message):
    __slots__ = ("kind", "value")
    KIND_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    kind: RidgeKind
    value: float
    def __init__(self, kind: _Optional[_Union[RidgeKind, str]] = ..., value: _Optional[float] = ...) -> None: ...

class Side(_message.Message):
    __slots__ = ("length", "root_order")
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    ROOT_ORDER_FIELD_NUMBER: _ClassVar[int]
    length: int
    root_order: float
    def __init__(self, length: _Optional[int] = ..., root_order: _Optional[float] = ...) -> None: ...

class Block(_message.Message):
    __slots__ = ("name", "sides", "ridge")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIDES_FIELD_NUMBER: _ClassVar[int]
    RIDGE_FIELD_NUMBER: _ClassVar[int]
    name: str
    sides: _containers.RepeatedCompositeFieldContainer[Side]
    ridge: Ridge
    def __init__(self, name: _Optional[str] = ..., sides: _Optional[_Iterable[_Union[Side, _Mapping]]] = ..., ridge: _Optional[_Union[Ridge, _Mapping]] = ...) -> None: ...

class Manifest(_message.Message):
    __slots__ = ("blocks", "statistics_dtype", "preconditioner_dtype", "snapshots_in_flight")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    STATISTICS_DTYPE_FIELD_NUMBER: _ClassVar[int]
    PRECONDITIONER_DTYPE_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOTS_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    blocks: _containers.RepeatedCompositeFieldContainer[Block]
    statistics_dtype: DType
    preconditioner_dtype: DType
    snapshots_in_flight: int
    def __init__(self, blocks: _Optional[_Iterable[_Union[Block, _Mapping]]] = ..., statistics_dtype: _Optional[_Union[DType, str]] = ..., preconditioner_dtype: _Optional[_Union[DType, str]] = ..., snapshots_in_flight: _Optional[int] = ...) -> None: ...

class OpenSessionRequest(_message.Message):
    __slots__ = ("protocol_version", "job", "rank", "world_size", "epoch", "manifest", "max_staleness", "client")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    MAX_STALENESS_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    job: str
    rank: int
    world_size: int
    epoch: int
    manifest: Manifest
    max_staleness: int
    client: str
    def __init__(self, protocol_version: _Optional[int] = ..., job: _Optional[str] = ..., rank: _Optional[int] = ..., world_size: _Optional[int] = ..., epoch: _Optional[int] = ..., manifest: _Optional[_Union[Manifest, _Mapping]] = ..., max_staleness: _Optional[int] = ..., client: _Optional[str] = ...) -> None: ...

class OpenSessionResponse(_message.Message):
    __slots__ = ("session_id", "protocol_version", "service_id", "placement", "limits")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    SERVICE_ID_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    protocol_version: int
    service_id: str
    placement: Placement
    limits: Limits
    def __init__(self, session_id: _Optional[str] = ..., protocol_version: _Optional[int] = ..., service_id: _Optional[str] = ..., placement: _Optional[_Union[Placement, _Mapping]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ...) -> None: ...

class Placement(_message.Message):
    __slots__ = ("revision", "fronts")
    REVISION_FIELD_NUMBER: _ClassVar[int]
    FRONTS_FIELD_NUMBER: _ClassVar[int]
    revision: int
    fronts: _containers.RepeatedCompositeFieldContainer[Front]
    def __init__(self, revision: _Optional[int] = ..., fronts: _Optional[_Iterable[_Union[Front, _Mapping]]] = ...) -> None: ...

class Front(_message.Message):
    __slots__ = ("address", "blocks")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    address: str
    blocks: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, address: _Optional[str] = ..., blocks: _Optional[_Iterable[int]] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_message_bytes", "credit_bytes", "session_ttl_seconds")
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    CREDIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    SESSION_TTL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    max_message_bytes: int
    credit_bytes: int
    session_ttl_seconds: float
    def __init__(self, max_message_bytes: _Optional[int] = ..., credit_bytes: _Optional[int] = ..., session_ttl_seconds: _Optional[float] = ...) -> None: ...

class TrainerMessage(_message.Message):
    __slots__ = ("attach", "chunks", "receipts")
    ATTACH_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    RECEIPTS_FIELD_NUMBER: _ClassVar[int]
    attach: Attach
    chunks: Chunks
    receipts: Receipts
    def __init__(self, attach: _Optional[_Union[Attach, _Mapping]] = ..., chunks: _Optional[_Union[Chunks, _Mapping]] = ..., receipts: _Optional[_Union[Receipts, _Mapping]] = ...) -> None: ...

class ServiceMessage(_message.Message):
    __slots__ = ("attached", "chunks", "receipts", "nacks", "drain")
    ATTACHED_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    RECEIPTS_FIELD_NUMBER: _ClassVar[int]
    NACKS_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    attached: Attached
    chunks: Chunks
    receipts: Receipts
    nacks: Nacks
    drain: Drain
    def __init__(self, attached: _Optional[_Union[Attached, _Mapping]] = ..., chunks: _Optional[_Union[Chunks, _Mapping]] = ..., receipts: _Optional[_Union[Receipts, _Mapping]] = ..., nacks: _Optional[_Union[Nacks, _Mapping]] = ..., drain: _Optional[_Union[Drain, _Mapping]] = ...) -> None: ...

class Attach(_message.Message):
    __slots__ = ("session_id", "epoch", "credit_bytes")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CREDIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    epoch: int
    credit_bytes: int
    def __init__(self, session_id: _Optional[str] = ..., epoch: _Optional[int] = ..., credit_bytes: _Optional[int] = ...) -> None: ...

class Attached(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class Chunks(_message.Message):
    __slots__ = ("chunks",)
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    chunks: _containers.RepeatedCompositeFieldContainer[MatrixChunk]
    def __init__(self, chunks: _Optional[_Iterable[_Union[MatrixChunk, _Mapping]]] = ...) -> None: ...

class MatrixChunk(_message.Message):
    __slots__ = ("block", "side", "step", "offset", "payload", "crc32")
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    SIDE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    CRC32_FIELD_NUMBER: _ClassVar[int]
    block: int
    side: int
    step: int
    offset: int
    payload: bytes
    crc32: int
    def __init__(self, block: _Optional[int] = ..., side: _Optional[int] = ..., step: _Optional[int] = ..., offset: _Optional[int] = ..., payload: _Optional[bytes] = ..., crc32: _Optional[int] = ...) -> None: ...

class Receipts(_message.Message):
    __slots__ = ("receipts",)
    RECEIPTS_FIELD_NUMBER: _ClassVar[int]
    receipts: _containers.RepeatedCompositeFieldContainer[Receipt]
    def __init__(self, receipts: _Optional[_Iterable[_Union[Receipt, _Mapping]]] = ...) -> None: ...

class Receipt(_message.Message):
    __slots__ = ("block", "step")
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    block: int
    step: int
    def __init__(self, block: _Optional[int] = ..., step: _Optional[int] = ...) -> None: ...

class Nacks(_message.Message):
    __slots__ = ("nacks",)
    NACKS_FIELD_NUMBER: _ClassVar[int]
    nacks: _containers.RepeatedCompositeFieldContainer[Nack]
    def __init__(self, nacks: _Optional[_Iterable[_Union[Nack, _Mapping]]] = ...) -> None: ...

class Nack(_message.Message):
    __slots__ = ("block", "step", "reason", "detail", "on_arrival")
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    ON_ARRIVAL_FIELD_NUMBER: _ClassVar[int]
    block: int
    step: int
    reason: NackReason
    detail: str
    on_arrival: bool
    def __init__(self, block: _Optional[int] = ..., step: _Optional[int] = ..., reason: _Optional[_Union[NackReason, str]] = ..., detail: _Optional[str] = ..., on_arrival: bool = ...) -> None: ...

class Drain(_message.Message):
    __slots__ = ("grace_seconds",)
    GRACE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    grace_seconds: float
    def __init__(self, grace_seconds: _Optional[float] = ...) -> None: ...

class CloseSessionRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    def __init__(self, session_id: _Optional[str] = ...) -> None: ...

class CloseSessionResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("protocol_version_min", "protocol_version_max", "service_version", "service_id", "draining", "workers", "uptime_seconds", "jobs")
    PROTOCOL_VERSION_MIN_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_MAX_FIELD_NUMBER: _ClassVar[int]
    SERVICE_VERSION_FIELD_NUMBER: _ClassVar[int]
    SERVICE_ID_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    UPTIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    JOBS_FIELD_NUMBER: _ClassVar[int]
    protocol_version_min: int
    protocol_version_max: int
    service_version: str
    service_id: str
    draining: bool
    workers: int
    uptime_seconds: float
    jobs: _containers.RepeatedCompositeFieldContainer[JobStatus]
    def __init__(self, protocol_version_min: _Optional[int] = ..., protocol_version_max: _Optional[int] = ..., service_version: _Optional[str] = ..., service_id: _Optional[str] = ..., draining: bool = ..., workers: _Optional[int] = ..., uptime_seconds: _Optional[float] = ..., jobs: _Optional[_Iterable[_Union[JobStatus, _Mapping]]] = ...) -> None: ...

class JobStatus(_message.Message):
    __slots__ = ("job", "epoch", "ranks", "blocks", "snapshots_received", "preconditioners_published", "nacks", "blocks_pending", "blocks_in_flight")
    JOB_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOTS_RECEIVED_FIELD_NUMBER: _ClassVar[int]
    PRECONDITIONERS_PUBLISHED_FIELD_NUMBER: _ClassVar[int]
    NACKS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_PENDING_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    job: str
    epoch: int
    ranks: int
    blocks: int
    snapshots_received: int
    preconditioners_published: int
    nacks: int
    blocks_pending: int
    blocks_in_flight: int
    def __init__(self, job: _Optional[str] = ..., epoch: _Optional[int] = ..., ranks: _Optional[int] = ..., blocks: _Optional[int] = ..., snapshots_received: _Optional[int] = ..., preconditioners_published: _Optional[int] = ..., nacks: _Optional[int] = ..., blocks_pending: _Optional[int] = ..., blocks_in_flight: _Optional[int] = ...) -> None: ...
