"""The roots of the exchange that needs no service are the service's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from preconditioner_client import Ridge
from preconditioner_client.roots import inverse_root
from preconditioner_service import roots

KINDS = {
    "relative": (Ridge(kind="relative", value=1e-4), roots.RelativeRidge(1e-4)),
    "absolute": (Ridge(kind="absolute", value=0.3), roots.AbsoluteRidge(0.3)),
    "trace": (Ridge(kind="trace", value=0.1), roots.TraceRidge(0.1)),
    "pseudo_inverse": (Ridge(kind="pseudo_inverse", value=1e-3), roots.PseudoInverse(1e-3)),
}


@pytest.mark.parametrize("p", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("rank", [0, 5, 30])
@pytest.mark.parametrize("kind", KINDS)
def test_they_agree(kind, rank, p):
    here, there = KINDS[kind]
    gradient = np.random.default_rng(rank).standard_normal((12, rank)).astype(np.float32)
    statistics = gradient @ gradient.T
    found = inverse_root(torch.from_numpy(statistics), p, here).numpy()
    expected = roots.inverse_root(statistics, p, conditioning=there, method="eigh").matrix
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * max(np.abs(expected).max(), 1e-30))


def test_a_singular_matrix_without_a_ridge_is_refused():
    for ridge in (Ridge(kind="relative", value=0.0), Ridge(kind="absolute", value=0.0)):
        with pytest.raises(ValueError, match="use a ridge > 0"):
            inverse_root(torch.zeros(3, 3), 4.0, ridge)
