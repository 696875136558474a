"""A checkpoint does not depend on where the roots were computed: in this process, or by a real service."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

from preconditioner_client import LocalExchange, Shampoo, StalenessConfig, attach
from preconditioner_client.adapters import metrics_source

SCHEDULED = StalenessConfig(adoption="scheduled", refresh_every=3, delay=3)


def setup(exchange, attached):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    settings = {"staleness": SCHEDULED, "service": exchange}
    if not attached:
        return model, Shampoo(model.named_parameters(), lr=0.01, **settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    attach(optimizer, model, **settings)
    return model, optimizer


def train(model, optimizer, steps):
    for step in steps:
        torch.manual_seed(step)
        optimizer.zero_grad()
        x = torch.randn(32, 6)
        nn.functional.mse_loss(model(x), x[:, :3]).backward()
        optimizer.step()


def handed_over(source, target, attached):
    """Weights and last metrics of a run that goes on elsewhere after ten of twenty steps."""
    model, optimizer = setup(source, attached)
    train(model, optimizer, range(10))
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    model, optimizer = setup(target, attached)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    before = metrics_source(optimizer).metrics()
    assert before["blocks_with_version"] == before["blocks"] == 2, "it starts with what it had"
    train(model, optimizer, range(10, 20))
    return model, metrics_source(optimizer).metrics()


@pytest.mark.parametrize("attached", [False, True])
def test_it_is_handed_over_in_both_directions(service, attached):
    expected, _ = handed_over(LocalExchange(), LocalExchange(), attached)
    for source, target in ((LocalExchange(), service), (service, LocalExchange())):
        model, metrics = handed_over(source, target, attached)
        assert metrics["step"] == 20
        assert metrics["versions_adopted"] > 0
        for p, q in zip(model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
