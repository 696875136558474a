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


class Experts(nn.Module):
    """Layers of which each rank uses some, in every step others; ``aside`` without a call of its module."""

    NAMES = ("one", "two", "both", "seldom", "aside")

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(4, 4, bias=False) for name in self.NAMES})

    @staticmethod
    def used(step, rank):
        turns = {"one": (step + rank) % 2 == 0, "two": (step + rank) % 2 == 1, "seldom": step in (1, 2)}
        return [name for name in Experts.NAMES if turns.get(name, True)]

    @staticmethod
    def factors(name, steps, beta=0.95):
        """``G`` and ``A`` of a layer from the examples of two ranks, and the number of steps that had any."""
        factors, updates = [torch.zeros(4, 4), torch.zeros(4, 4)], 0
        for step in steps:
            parts = [Experts.batch(step, rank) for rank in range(2) if name in Experts.used(step, rank)]
            inputs, gradients = (torch.cat([torch.empty(0, 4), *(p[i] for p in parts)]) for i in range(2))
            if len(inputs) and name != "aside":
                new = [side.mT @ side / len(inputs) for side in (gradients, inputs)]
                factors = [torch.lerp(old, x, 1 - beta) for old, x in zip(factors, new, strict=True)]
                updates += 1
        return factors, updates

    @staticmethod
    def batch(step, rank):
        """Inputs, and gradients of each example's loss by every layer's outputs; one rank may have none."""
        generator = torch.Generator().manual_seed(10 * step + rank)
        size = 0 if (step, rank) in ((3, 0), (4, 1)) else 5 - 3 * rank
        return torch.randn(2, size, 4, generator=generator).unbind(0)

    def forward(self, inputs, gradients, names):
        """The mean loss, which is linear in the outputs, so that no factor depends on the weights."""
        total = 0.0
        for name in names:
            layer = self.layers[name]
            outputs = F.linear(inputs, layer.weight) if name == "aside" else layer(inputs)
            total = total + (outputs * gradients).sum()
        return total / max(1, len(inputs))


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
