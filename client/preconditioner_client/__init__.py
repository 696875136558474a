"""Asynchronous Shampoo for a training process: the optimizer and its exchange with the service."""

from preconditioner_client.attach import Attachment, attach
from preconditioner_client.config import (
    Accumulation,
    Adoption,
    BlockingConfig,
    Grafting,
    GraftingConfig,
    Ridge,
    RidgeKind,
    RootConfig,
    StalenessConfig,
    StalePolicy,
    StatisticsConfig,
)
from preconditioner_client.distribution import DistributedConfig
from preconditioner_client.exchange import (
    Arrival,
    BlockSpec,
    Exchange,
    ExchangeError,
    LocalExchange,
    Rejection,
    SessionSpec,
    Snapshot,
)
from preconditioner_client.memory import MemoryEstimate
from preconditioner_client.service_config import ServiceConfig
from preconditioner_client.shampoo import Shampoo

__all__ = [
    "Accumulation",
    "Adoption",
    "Arrival",
    "Attachment",
    "BlockSpec",
    "BlockingConfig",
    "DistributedConfig",
    "Exchange",
    "ExchangeError",
    "Grafting",
    "GraftingConfig",
    "LocalExchange",
    "MemoryEstimate",
    "Rejection",
    "Ridge",
    "RidgeKind",
    "RootConfig",
    "ServiceConfig",
    "SessionSpec",
    "Shampoo",
    "Snapshot",
    "StalePolicy",
    "StalenessConfig",
    "StatisticsConfig",
    "attach",
]
