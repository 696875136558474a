"""Inverse roots in the training process, in float64, for the exchange that needs no service."""

from __future__ import annotations

import torch

from preconditioner_client.config import Ridge, RidgeKind


def inverse_root(matrix: torch.Tensor, root_order: float, ridge: Ridge) -> torch.Tensor:
    """``(A + ridge I)^(-1/p)`` of a symmetric positive semi-definite matrix by eigendecomposition.

    Args:
        matrix: A, shape (n, n), any floating dtype, on any device.
        root_order: p > 0.
        ridge: how the spectrum is conditioned.

    Returns:
        Exactly symmetric float32 tensor of shape (n, n) on the same device. To a ridge relative to its
        spectrum a zero matrix has the scale 1, so that its root is a multiple of the identity; its
        pseudo-inverse is zero.

    Raises:
        ValueError: the matrix is not finite, or has an eigenvalue below zero by more than rounding.
    """
    n = matrix.shape[-1]
    a = matrix.to(torch.float64)
    if not bool(torch.isfinite(a).all()):
        raise ValueError("the statistics hold NaN or infinity")
    scale = float(a.abs().max())
    values, vectors = torch.linalg.eigh(a)
    largest = float(values[-1])
    # float32 statistics carry rounding of about n eps32 of their largest eigenvalue.
    if float(values[0]) < -1e-6 * n * max(largest, scale):
        raise ValueError(f"the statistics have the eigenvalue {float(values[0]):.3e} < 0")
    values = values.clamp_min(0.0)
    if ridge.kind is RidgeKind.PSEUDO_INVERSE:
        kept = values > ridge.value * largest
        powers = torch.where(kept, values, 1.0).pow(-0.5 / root_order) * kept
    else:
        shift = {
            RidgeKind.RELATIVE: ridge.value * (largest or 1.0),
            RidgeKind.ABSOLUTE: ridge.value,
            RidgeKind.TRACE: ridge.value * (float(values.mean()) or 1.0),
        }[ridge.kind]
        values = values + shift
        if float(values[0]) <= 0.0:
            raise ValueError("the statistics are singular and the ridge is 0: use a ridge > 0")
        powers = values.pow(-0.5 / root_order)
    half = vectors * powers
    root = half @ half.T
    return torch.triu(root).add(torch.triu(root, 1).T).to(torch.float32)
