"""Scenarios of ``torch.amp.GradScaler`` on several ranks, one of which has infinity in a batch."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import kfac_models
from distributed_kfac import make as make_kfac
from distributed_kfac import own_part
from distributed_shards import aligned, shard, whole
from distributed_training import (
    ADAMW,
    SCHEDULED,
    assert_replicas_are_equal,
    make_attached,
    make_optimizer,
    on_all_ranks,
)
from preconditioner_client import LocalExchange
from preconditioner_client.adapters import metrics_source

STEPS, POISONED = 16, 8
"""In the poisoned step versions are in use, and snapshots of the schedule under way."""

SCALE = 2.0**10
EXACT = {"rtol": 0, "atol": 0}
KINDS = ("Shampoo", *ADAMW)


def make(kind, model, **settings):
    if kind == "Shampoo":
        return make_optimizer(model, **settings)
    return make_attached(model, kind, **settings)[0]


def batch(step, rank):
    """One rank's part of a step's batch."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(8, 12, generator=generator)


def loss_of(model, x):
    return (model(x)[:, :12] - x).square().mean()


def is_unscaled_by_the_loop(kind):
    """As clipping and fused optimizers need it; for the others the scaler does it."""
    return kind in ("Shampoo", "fused")


def weights(model):
    return [whole(p).detach().clone() for p in model.parameters()]


def poisoned(step):
    """Whether this rank's batch is what makes the gradients infinite."""
    return step == POISONED and dist.get_rank() == dist.get_world_size() - 1


def new_scaler():
    return torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=1000)


def train_scaled(kind, optimizer, model, module, clip):
    """``module`` is ``model`` as it is called."""
    scaler = new_scaler()
    for step in range(STEPS):
        x = batch(step, dist.get_rank())
        if poisoned(step):
            x[3, 5] = float("inf")
        optimizer.zero_grad()
        scaler.scale(loss_of(module, x)).backward()
        if is_unscaled_by_the_loop(kind):
            scaler.unscale_(optimizer)
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        before = weights(model)
        scaler.step(optimizer)
        scaler.update()
        same = all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
        assert same == (step == POISONED), step
    assert on_all_ranks(scaler.get_scale()) == [SCALE / 2] * dist.get_world_size()


def train_plainly(kind, optimizer, model, clip):
    """In one process, on the batches of all ranks, without a scaler and without the poisoned step.

    Gradients are summed over the ranks' parts. The scale and the numbers of ranks are powers of two, and two
    terms have one sum: with two ranks every bit is the same.
    """
    ranks = dist.get_world_size()
    for step in range(STEPS):
        if step == POISONED:
            continue
        optimizer.zero_grad()
        for rank in range(ranks):
            (loss_of(model, batch(step, rank)) / ranks).backward()
        if clip and is_unscaled_by_the_loop(kind):
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()


def tensors(optimizer):
    """All of the optimizer's state and of what is attached to it; of blocks those of this rank."""
    saved = optimizer.state_dict()
    attached = saved.get("preconditioner", {"state": []})["state"]
    return {
        (place, index, key): whole(value)
        for place, states in (("own", saved["state"]), ("attached", dict(enumerate(attached))))
        for index, state in states.items()
        for key, value in state.items()
        if torch.is_tensor(value)
    }


def assert_skipped_by_all(kind, sharded=False, rounding=EXACT, **settings):
    """Weights and state are those of one process that never saw the poisoned step, to that rounding."""
    model, alone = aligned(), aligned()
    module = shard(model) if sharded else DistributedDataParallel(model)
    optimizer, single = make(kind, model, **settings), make(kind, alone, distributed="off", **settings)
    # Shards sum the norm of the gradient in another order.
    clip = not sharded
    try:
        train_scaled(kind, optimizer, model, module, clip)
        train_plainly(kind, single, alone, clip)
        metrics = metrics_source(optimizer).metrics()
        assert metrics["step"] == STEPS - 1
        assert metrics["wait_timeouts"] == 0
        assert metrics["versions_adopted"] >= 2 * metrics["blocks"] > 0
        if not sharded:
            assert_replicas_are_equal(model)
        torch.testing.assert_close(weights(model), weights(alone), **rounding)
        own, expected = tensors(optimizer), tensors(single)
        torch.testing.assert_close(own, {key: expected[key] for key in own}, **rounding)
        # Every block is some rank's, so that nothing was left uncompared.
        assert {key for keys in on_all_ranks(list(own)) for key in keys} == expected.keys()
        assert any(".statistics." in key for _, _, key in expected)
    finally:
        metrics_source(optimizer).close()
        metrics_source(single).close()


def rounding_of_sums():
    """What four ranks may differ by from one process, which adds their gradients in another order."""
    return EXACT if dist.get_world_size() == 2 else {"rtol": 1e-2, "atol": 1e-4}


def all_replicas_skip_what_is_infinite_on_one(folder):
    for kind in KINDS:
        assert_skipped_by_all(kind, rounding=rounding_of_sums())


def all_shards_skip_what_is_infinite_on_one(folder):
    for kind in KINDS if dist.get_world_size() == 2 else ("fused",):
        assert_skipped_by_all(kind, sharded=True, rounding=rounding_of_sums())


def replicas_of_kfac_skip_what_is_infinite_on_one(folder):
    """The factors of the batch are dropped with it, on the ranks where they are finite, too."""
    models = []
    for whether in (True, False):
        model = kfac_models.seeded(kfac_models.Words)
        module = DistributedDataParallel(model)
        scaler = new_scaler()
        optimizer = make_kfac(
            model, staleness=SCHEDULED, service=LocalExchange(1), grad_scale=scaler.get_scale
        )
        for step in range(STEPS):
            if step == POISONED and not whether:
                continue
            inputs, targets = kfac_models.batch(model, step)
            optimizer.zero_grad()
            loss = kfac_models.loss_of(module, inputs[own_part()], targets[own_part()])
            scaler.scale(loss * float("inf") if poisoned(step) else loss).backward()
            scaler.step(optimizer)
            scaler.update()
            assert_replicas_are_equal(model)
        assert scaler.get_scale() == (SCALE / 2 if whether else SCALE)
        assert optimizer.metrics()["step"] == STEPS - 1
        assert optimizer.metrics()["versions_adopted"] > 0
        models.append(model)
    assert all(torch.equal(a, b) for a, b in zip(*map(weights, models), strict=True))


ON_FOUR_RANKS = [
    all_replicas_skip_what_is_infinite_on_one,
    all_shards_skip_what_is_infinite_on_one,
]
SCENARIOS = [*ON_FOUR_RANKS, replicas_of_kfac_skip_what_is_infinite_on_one]
