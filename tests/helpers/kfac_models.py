"""Small models of every layer that K-FAC knows, and one batch of training."""

from __future__ import annotations

import itertools

import torch
from torch import nn
from torch.nn import functional as F


class Convolutional(nn.Sequential):
    """Images of 8 x 8 to classes, with both kinds of convolution's neighbours."""

    def __init__(self, channels=4, classes=10):
        super().__init__(
            nn.Conv2d(1, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * channels * 16, classes),
        )


class Dense(nn.Sequential):
    """Images of 8 x 8 to classes, with linear layers only, in any dtype."""

    def __init__(self, *widths, classes=10):
        sides = (64, *widths, classes)
        layers = [nn.Linear(n, m) for n, m in itertools.pairwise(sides)]
        super().__init__(
            nn.Flatten(), *(part for layer in layers[:-1] for part in (layer, nn.Tanh())), layers[-1]
        )

    def forward(self, images):
        return super().forward(images.to(self[1].weight.dtype))


class Words(nn.Module):
    """Sequences of indices to classes, with a parameter of no layer."""

    def __init__(self, vocabulary=9, width=5, classes=4):
        super().__init__()
        self.table = nn.Embedding(vocabulary, width)
        self.offset = nn.Parameter(torch.zeros(width))
        self.output = nn.Linear(width, classes)

    def forward(self, indices):
        return self.output(torch.tanh(self.table(indices) + self.offset))


def seeded(make, seed=0):
    torch.manual_seed(seed)
    return make()


def batch(model, step, size=16):
    """The same inputs and targets in every run."""
    generator = torch.Generator().manual_seed(1000 + step)
    if isinstance(model, Words):
        inputs = torch.randint(0, 9, (size, 3), generator=generator)
        return inputs, (inputs + step % 2) % 4
    images = torch.randn(size, 1, 8, 8, generator=generator)
    return images, torch.randint(0, 10, (size,), generator=generator)


def loss_of(module, inputs, targets):
    outputs = module(inputs)
    return F.cross_entropy(outputs.reshape(-1, outputs.shape[-1]), targets.reshape(-1))


def train(module, optimizer, steps, kind=None, part=slice(None)):
    """Losses of some steps; ``part`` of each batch is this rank's."""
    losses = []
    for step in steps:
        inputs, targets = batch(kind or module, step)
        optimizer.zero_grad()
        loss = loss_of(module, inputs[part], targets[part])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
