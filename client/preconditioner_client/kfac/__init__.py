"""K-FAC beside Shampoo: layers, factors, and their exchange with the same service."""

from preconditioner_client.kfac.adaptive_refresh import AdaptiveRefresh
from preconditioner_client.kfac.optimizer import KFAC, BatchNormFisher
from preconditioner_client.kfac.schedule import (
    PolynomialDecay,
    polynomial_decay,
    rescale_weights,
    scaled_momentum,
)

__all__ = [
    "KFAC",
    "AdaptiveRefresh",
    "BatchNormFisher",
    "PolynomialDecay",
    "polynomial_decay",
    "rescale_weights",
    "scaled_momentum",
]
