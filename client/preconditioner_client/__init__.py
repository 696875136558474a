"""Asynchronous Shampoo and K-FAC for a training process: optimizers, and their exchange with the service."""

import os

from preconditioner_client.attach import attach
from preconditioner_client.attached_groups import GroupConfig
from preconditioner_client.attachment import Attachment
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
from preconditioner_client.kfac import KFAC, AdaptiveRefresh, PolynomialDecay, rescale_weights
from preconditioner_client.memory import MemoryEstimate
from preconditioner_client.service_config import ServiceConfig
from preconditioner_client.shampoo import Shampoo

__all__ = [
    "KFAC",
    "Accumulation",
    "AdaptiveRefresh",
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
    "GroupConfig",
    "LocalExchange",
    "MemoryEstimate",
    "PolynomialDecay",
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
    "rescale_weights",
]

# gRPC reads it when it is imported, which is later than this. Its handlers of forks abort children of a
# process whose streams are in use, as the workers of a DataLoader are (github.com/grpc/grpc/issues/32992);
# without them a child leaves alone what it got.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
