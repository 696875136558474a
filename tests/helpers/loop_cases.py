"""What loops and models do with an optimizer, each a small case that runs with any exchange."""

from __future__ import annotations

import copy
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from preconditioner_client import (
    BlockingConfig,
    GraftingConfig,
    GroupConfig,
    Ridge,
    RootConfig,
    Shampoo,
    StalenessConfig,
    StatisticsConfig,
    attach,
)

STALENESS = StalenessConfig(
    refresh_every=2, adoption="scheduled", delay=3, max_staleness=20, stale_timeout=30
)
LR = 0.02


class Case:
    """A multilayer perceptron in a plain loop; subclasses change what they are about.

    Class attributes:
        steps: how many are made.
        options: of both ``Shampoo`` and ``attach``.
        shampoo_options: of ``Shampoo`` alone.
        optimizer_options: of the optimizer that is attached to.
        attach_options: of ``attach`` alone.
        kind: of that optimizer.
        rounding: relative difference of weights that rounding of the roots may come to.
    """

    steps = 14
    options: ClassVar = {}
    shampoo_options: ClassVar = {}
    optimizer_options: ClassVar = {}
    attach_options: ClassVar = {}
    kind = torch.optim.AdamW
    rounding = 1e-4

    def __init__(self, attached):
        self.attached = attached
        torch.manual_seed(0)
        self.model = self.make_model()
        self.x = torch.randn(64, 12) * torch.logspace(0, -2, 12)
        self.y = self.x[:, 8:] * 100

    def make_model(self):
        return nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 4))

    def groups(self):
        return list(self.model.named_parameters())

    def loss(self, step):
        return F.mse_loss(self.model(self.x).float(), self.y)

    def before(self, step, optimizer):
        """Whatever comes between two steps."""

    def step(self, step, optimizer):
        optimizer.zero_grad()
        self.loss(step).backward()
        optimizer.step()

    def run(self, exchange, job=None):
        """Train; returns the metrics of the preconditioner."""
        settings = {"service": exchange, "job": job, "staleness": STALENESS, **self.options}
        if self.attached:
            optimizer = self.kind(self.groups(), **{"lr": LR, **self.optimizer_options})
            source = attach(optimizer, self.model, **settings, **self.attach_options)
        else:
            source = optimizer = Shampoo(self.groups(), **{"lr": LR, **settings, **self.shampoo_options})
        try:
            for step in range(self.steps):
                self.before(step, optimizer)
                self.step(step, optimizer)
            self.after(optimizer)
            return source.metrics()
        finally:
            if self.attached:
                source.detach()
            else:
                optimizer.close()

    def after(self, optimizer):
        """Assertions about the optimizer at the end."""

    def weights(self):
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}


class PlainLoop(Case):
    pass


class GroupsOfTheirOwn(Case):
    """Settings of groups, and one that joins in the middle."""

    attach_options: ClassVar = {"groups": {0: GroupConfig(statistics=StatisticsConfig(beta=0.9))}}

    def groups(self):
        own = {} if self.attached else {"statistics": StatisticsConfig(beta=0.9), "beta1": 0.5}
        return [{"params": [self.model[0].weight, self.model[0].bias], "lr": 0.01, **own}]

    def before(self, step, optimizer):
        if step == 5:
            optimizer.add_param_group({"params": list(self.model[2].parameters()), "lr": 0.005})


class GroupsLeftAlone(Case):
    """An embedding with sparse gradients, and a head that joins in the middle."""

    optimizer_options: ClassVar = {"momentum": 0.9}
    attach_options: ClassVar = {"groups": {0: None, 2: None}}
    kind = torch.optim.SGD

    def make_model(self):
        return nn.Sequential(nn.Embedding(9, 6, sparse=True), nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 9))

    def groups(self):
        return [{"params": list(self.model[i].parameters())} for i in (0, 1)]

    def before(self, step, optimizer):
        if step == 5:
            optimizer.add_param_group({"params": list(self.model[3].parameters())})

    def loss(self, step):
        tokens = torch.arange(step, step + 32) % 9
        return F.cross_entropy(self.model(tokens), (3 * tokens + 1) % 9)

    def after(self, optimizer):
        assert self.model[0].weight.grad.is_sparse
        kept = [len(state) > 1 for state in optimizer.state_dict()["preconditioner"]["state"]]
        assert kept == [False, True, False, False, False]


class GradientsThatAreMissing(Case):
    """A layer that takes part in two of three steps."""

    def loss(self, step):
        hidden = self.model[0](self.x)
        return F.mse_loss(self.model[2](torch.tanh(hidden)) if step % 3 else hidden[:, :4], self.y)


class FrozenThenThawed(Case):
    def before(self, step, optimizer):
        self.model[0].requires_grad_(step >= 6)


class TiedWeights(Case):
    def make_model(self):
        model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 9, bias=False))
        model[1].weight = model[0].weight
        return model

    def loss(self, step):
        tokens = torch.arange(step, step + 32) % 9
        return F.cross_entropy(self.model(tokens), (3 * tokens + 1) % 9)


class EveryShape(Case):
    """0-D, 1-D, empty, and of three, four and five dimensions."""

    options: ClassVar = {"blocking": BlockingConfig(block_size=8, merge_dims=False)}

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            shapes = {"scalar": (), "vector": (7,), "empty": (0, 3), "three": (3, 4, 5), "four": (2, 3, 4, 3),
                      "five": (2, 3, 2, 3, 2), "cut": (11, 9)}  # fmt: skip
            for name, shape in shapes.items():
                self.register_parameter(name, nn.Parameter(torch.randn(shape)))

    def make_model(self):
        return self.Model()

    def loss(self, step):
        generator = torch.Generator().manual_seed(step)
        terms = [
            (p * (1 + torch.randn(p.shape, generator=generator)) - 1).square().sum()
            for p in self.model.parameters()
        ]
        return torch.stack(terms).sum()


class WideFromOneSide(Case):
    """As embeddings and output layers of large vocabularies."""

    options: ClassVar = {"blocking": BlockingConfig(block_size=16, max_side=20)}

    def make_model(self):
        return nn.Sequential(nn.Embedding(50, 6), nn.Linear(6, 50))

    def loss(self, step):
        tokens = (torch.arange(64) * 7 + step) % 50
        return F.cross_entropy(self.model(tokens), (tokens * 3) % 50)


class Bfloat16Weights(Case):
    dtype = torch.bfloat16
    optimizer_options: ClassVar = {"eps": 1e-4}
    # One last digit of a weight.
    rounding = 2e-2

    def make_model(self):
        return super().make_model().to(self.dtype)

    def loss(self, step):
        return F.mse_loss(self.model(self.x.to(self.dtype)).float(), self.y)

    def after(self, optimizer):
        assert {p.dtype for p in self.model.parameters()} == {self.dtype}
        assert _statistics_dtypes(optimizer) == {torch.float32}


class Float16Weights(Bfloat16Weights):
    dtype = torch.float16


class Autocast(Case):
    # A root's last bit may move an activation to the next bfloat16.
    rounding = 2e-2

    def loss(self, step):
        with torch.autocast("cpu", torch.bfloat16):
            output = self.model(self.x)
        return F.mse_loss(output.float(), self.y)


class ScalerThatSkips(Case):
    """With clipping; the gradient of the fifth step overflows."""

    def __init__(self, attached):
        super().__init__(attached)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)

    def step(self, step, optimizer):
        optimizer.zero_grad()
        self.scaler.scale(self.loss(step)).backward()
        if step == 5:
            self.model[0].weight.grad[0, 0] = float("inf")
        self.scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(optimizer)
        self.scaler.update()

    def after(self, optimizer):
        assert self.scaler.get_scale() == 2.0**9


class Accumulation(Case):
    def step(self, step, optimizer):
        optimizer.zero_grad()
        for part in range(4):
            rows = slice(16 * part, 16 * part + 16)
            (F.mse_loss(self.model(self.x[rows]), self.y[rows]) / 4).backward()
        optimizer.step()


class Closures(Case):
    def step(self, step, optimizer):
        def closure():
            optimizer.zero_grad()
            loss = self.loss(step)
            loss.backward()
            return loss

        assert optimizer.step(closure).item() > 0


class Maximize(Case):
    shampoo_options: ClassVar = {"maximize": True}
    optimizer_options: ClassVar = {"maximize": True}

    def loss(self, step):
        return -super().loss(step)


class TensorRateOnASchedule(Case):
    shampoo_options: ClassVar = {"lr": torch.tensor(LR)}
    optimizer_options: ClassVar = {"lr": torch.tensor(LR)}
    _scheduler = None

    def __init__(self, attached):
        super().__init__(attached)
        # The scheduler multiplies it in place.
        self.shampoo_options, self.optimizer_options = (
            copy.deepcopy(options) for options in (self.shampoo_options, self.optimizer_options)
        )

    def before(self, step, optimizer):
        if self._scheduler is None:
            self._scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)

    def step(self, step, optimizer):
        super().step(step, optimizer)
        self._scheduler.step()


class CompiledModel(Case):
    def make_model(self):
        torch._dynamo.reset()
        return torch.compile(super().make_model(), backend="aot_eager")


class Exponents(Case):
    options: ClassVar = {"root": RootConfig(exponent={2: 0.5, 1: 1.0}, ridge=Ridge(value=1e-3))}


class PseudoInverse(Case):
    options: ClassVar = {"root": RootConfig(ridge=Ridge(kind="pseudo_inverse", value=1e-5))}


class StatisticsEveryThird(Case):
    options: ClassVar = {"statistics": StatisticsConfig(every=3)}


class SummedStatistics(Case):
    options: ClassVar = {"statistics": StatisticsConfig(accumulation="sum")}


class Blend(Case):
    options: ClassVar = {"grafting": GraftingConfig(method="sgd", blend_steps=6)}


class CoupledDecay(Case):
    shampoo_options: ClassVar = {"weight_decay": 0.1, "decoupled_weight_decay": False}
    optimizer_options: ClassVar = {"weight_decay": 0.1}


class DecoupledDecay(Case):
    shampoo_options: ClassVar = {"weight_decay": 0.1}
    optimizer_options: ClassVar = {"weight_decay": 0.5}


class NesterovMomentum(Case):
    shampoo_options: ClassVar = {"momentum": 0.9, "nesterov": True, "lr": 0.002}


class GraftedToLARS(Case):
    options: ClassVar = {"grafting": GraftingConfig(method="lars")}
    shampoo_options: ClassVar = {"lr": 1.0, "weight_decay": 0.01}


class GraftedToLAMB(Case):
    options: ClassVar = {"grafting": GraftingConfig(method="lamb")}
    shampoo_options: ClassVar = {"weight_decay": 0.01}


class GraftedToAdagrad(Case):
    options: ClassVar = {"grafting": GraftingConfig(method="adagrad")}


class GraftedToNothing(Case):
    options: ClassVar = {"grafting": GraftingConfig(method="none")}
    shampoo_options: ClassVar = {"lr": 0.005}
    optimizer_options: ClassVar = {"lr": 0.005}


def _statistics_dtypes(optimizer):
    saved = optimizer.state_dict()
    states = saved["preconditioner"]["state"] if "preconditioner" in saved else list(saved["state"].values())
    return {s[key].dtype for s in states for key in s if ".statistics." in key}


SHAMPOO_ALONE = {NesterovMomentum}
ATTACHED_ALONE = {GroupsLeftAlone}
CASES = [
    PlainLoop,
    GroupsOfTheirOwn,
    GroupsLeftAlone,
    GradientsThatAreMissing,
    FrozenThenThawed,
    TiedWeights,
    EveryShape,
    WideFromOneSide,
    Bfloat16Weights,
    Float16Weights,
    Autocast,
    ScalerThatSkips,
    Accumulation,
    Closures,
    Maximize,
    TensorRateOnASchedule,
    CompiledModel,
    Exponents,
    PseudoInverse,
    StatisticsEveryThird,
    SummedStatistics,
    Blend,
    CoupledDecay,
    DecoupledDecay,
    NesterovMomentum,
    GraftedToLARS,
    GraftedToLAMB,
    GraftedToAdagrad,
    GraftedToNothing,
]
