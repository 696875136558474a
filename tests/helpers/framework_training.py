"""What is trained in every framework."""

from __future__ import annotations

import torch
from torch import nn

from preconditioner_client import LocalExchange, Shampoo, StalenessConfig, attach

SCHEDULED = StalenessConfig(adoption="scheduled", refresh_every=3, delay=4)


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def data(rows=64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, 6, generator=generator), torch.randn(rows, 3, generator=generator)


def make(model, attached=False, **settings):
    settings = {"staleness": SCHEDULED, "service": LocalExchange(), **settings}
    if not attached:
        return Shampoo(model.named_parameters(), lr=0.01, **settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    attach(optimizer, model, **settings)
    return optimizer
