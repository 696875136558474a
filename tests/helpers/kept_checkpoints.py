"""One optimizer of each kind that writes a checkpoint, in a run so small that its file can be kept.

``python tests/helpers/kept_checkpoints.py FOLDER`` writes a file of each kind there.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from preconditioner_client import KFAC, GraftingConfig, LocalExchange, Shampoo, StalenessConfig, attach

STEPS = 8
SCHEDULED = StalenessConfig(refresh_every=2, adoption="scheduled", delay=3, max_staleness=9)


def _shampoo(model):
    return Shampoo(
        model.named_parameters(), lr=1e-2, momentum=0.9, staleness=SCHEDULED, service=LocalExchange()
    )


def _kfac(model):
    return KFAC(
        model,
        lr=1e-2,
        grafting=GraftingConfig(method="adam"),
        staleness=SCHEDULED,
        service=LocalExchange(),
    )


def _attached(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    attach(
        optimizer,
        model,
        grafting=GraftingConfig(method="adam"),
        staleness=SCHEDULED,
        service=LocalExchange(),
    )
    return optimizer


KINDS = {"shampoo": _shampoo, "kfac": _kfac, "attach": _attached}


def make(kind):
    """A model with a layer of every sort that K-FAC keeps a state of, and the optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4), nn.BatchNorm1d(4))
    return model, KINDS[kind](model)


def train(model, optimizer, steps):
    for step in steps:
        inputs = torch.randint(4, (8,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), inputs).backward()
        optimizer.step()


def write(folder):
    for kind in KINDS:
        model, optimizer = make(kind)
        train(model, optimizer, range(STEPS))
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state, Path(folder) / f"{kind}.pt")


if __name__ == "__main__":
    write(sys.argv[1])
