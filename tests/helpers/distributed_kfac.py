"""Scenarios of K-FAC on replicas that each see a part of every batch."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from distributed_training import assert_replicas_are_equal, on_all_ranks
from kfac_models import Convolutional, Dense, Experts, Words, batch, loss_of, seeded, train
from live_tensors import Waiting, assert_is_bound, peaks_of_training
from preconditioner_client import KFAC, BlockingConfig, DistributedConfig, LocalExchange, StalenessConfig
from preconditioner_client.kfac.reduction import FactorReduction

EVERY_STEP = StalenessConfig(refresh_every=1, max_staleness=1)
SCHEDULED = StalenessConfig(refresh_every=3, adoption="scheduled", delay=4, max_staleness=10)


def make(model, **settings):
    defaults = {"service": LocalExchange(), "staleness": EVERY_STEP, "momentum": 0.5, "lr": 1e-2}
    return KFAC(model, **(defaults | settings))


def own_part(size=16):
    ranks = dist.get_world_size()
    return slice(dist.get_rank() * size // ranks, (dist.get_rank() + 1) * size // ranks)


def train_in_parts(model, optimizer, steps):
    return train(DistributedDataParallel(model), optimizer, steps, kind=model, part=own_part())


def furthest(model, other):
    """Largest difference of weights."""
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def replicas_train_as_one_process_on_the_whole_batch(folder):
    start, alone = seeded(Words), seeded(Words)
    train(alone, make(alone, distributed="off", damping=0.1), range(10))
    moved = furthest(start, alone)
    assert moved > 0.03
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float16, 2e-2), (torch.bfloat16, 2e-1)):
        model = seeded(Words)
        optimizer = make(model, factor_dtype=dtype, damping=0.1)
        train_in_parts(model, optimizer, range(10))
        assert_replicas_are_equal(model)
        assert furthest(model, alone) < tolerance * moved, (dtype, furthest(model, alone), moved)
        # Rounded factors are not indefinite.
        assert optimizer.metrics()["refused"] == 0


def half_precision_halves_the_bytes(folder):
    sent = {}
    for dtype in (torch.float32, torch.float16):
        model = seeded(Convolutional)
        optimizer = make(model, factor_dtype=dtype)
        train_in_parts(model, optimizer, range(2))
        sent[dtype] = optimizer.metrics()["factor_bytes_sent"]
    assert 0 < sent[torch.float16] < 0.51 * sent[torch.float32]


def layers_have_one_owner_and_replicas_stay_the_same(folder):
    model = seeded(Convolutional)
    overlap = DistributedConfig(overlap=True, bucket_bytes=64)
    blocking = BlockingConfig(block_size=64)
    optimizer = make(
        model, service=LocalExchange(2), staleness=SCHEDULED, distributed=overlap, blocking=blocking
    )
    train_in_parts(model, optimizer, range(12))
    assert_replicas_are_equal(model)
    blocks = on_all_ranks(optimizer.metrics()["blocks"])
    # Of the last layer's 129 inputs three pieces, and one block for each convolution.
    assert sum(blocks) == 5
    assert min(blocks) >= 1
    assert optimizer.metrics()["blocks_with_version"] == optimizer.metrics()["blocks"]


def a_replica_without_a_batch_of_a_layer_stays_the_same(folder):
    """Factors that only some ranks have, and such that are not finite."""
    model = seeded(Words)
    optimizer = make(model, momentum=0.0)
    train_in_parts(model, optimizer, range(3))
    for step in range(3, 6):
        parallel = DistributedDataParallel(model)
        train(parallel, _Spoiled(optimizer, step % 2 == dist.get_rank()), [step], kind=model, part=own_part())
        assert_replicas_are_equal(model)
        assert all(bool(p.isfinite().all()) for p in model.parameters())


def a_replica_with_an_empty_batch_or_without_a_layer_is_none_to_warn_of(folder):
    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    logging.getLogger("preconditioner_client").addHandler(handler)
    torch.manual_seed(0)
    model = nn.ModuleDict({"first": nn.Conv1d(2, 3, 2), "second": nn.Linear(4, 4), "third": nn.Linear(4, 2)})

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = model

        def forward(self, inputs):
            hidden = self.layers["first"](inputs)
            if dist.get_rank() == 0:
                hidden = self.layers["second"](hidden)
            return self.layers["third"](hidden)

    net = DistributedDataParallel(Net(), find_unused_parameters=True)
    optimizer = make(model, factor_dtype=torch.float32)
    inputs = torch.randn(8, 2, 5)[: None if dist.get_rank() == 0 else 0]
    for _ in range(4):
        optimizer.zero_grad()
        net(inputs).square().sum().backward()
        optimizer.step()
        assert_replicas_are_equal(model)
    logging.getLogger("preconditioner_client").removeHandler(handler)
    assert not records
    assert sum(on_all_ranks(optimizer.metrics()["blocks_with_version"])) == 3
    assert optimizer.metrics()["refused"] == 0
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def an_owner_takes_the_factors_of_layers_that_only_others_used(folder):
    """By number of examples; and none where nobody had any, or where hooks are passed by."""
    model = seeded(Experts)
    optimizer = make(model, factor_dtype=torch.float32)
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    rank, asked, reduce = dist.get_rank(), set(), FactorReduction.reduce
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            FactorReduction, "reduce", lambda self, own, keys: asked.update(keys) or reduce(self, own, keys)
        )
        for step in range(8):
            # A layer that nobody uses has a gradient all the same, of zeros.
            optimizer.zero_grad(set_to_none=False)
            parallel(*Experts.batch(step, rank), Experts.used(step, rank)).backward()
            optimizer.step()
            assert_replicas_are_equal(model)
    # On an accelerator the host waits for an answer: it needs none where hooks are known to be passed by.
    blocks = optimizer._planned().plans[0].blocks
    names = {Experts.NAMES[blocks[position].member.parameter] for _, position in asked}
    assert names == {"one", "two", "both", "seldom"}
    optimizer.consolidate_state_dict()
    states = optimizer.state_dict()["state"] if rank == 0 else {}
    for index, state in states.items():
        expected, updates = Experts.factors(Experts.NAMES[index], range(8))
        assert state["block.0:4,0:4.updates"] == updates, Experts.NAMES[index]
        for side, factor in enumerate(expected):
            statistics = state[f"block.0:4,0:4.statistics.{side}"]
            torch.testing.assert_close(statistics, factor, rtol=1e-5, atol=1e-6)


class _Spoiled:
    """An optimizer whose layers have no usable factors in this step, on some ranks."""

    def __init__(self, optimizer, spoiled):
        self._optimizer = optimizer
        self._spoiled = spoiled

    def zero_grad(self):
        self._optimizer.zero_grad()

    def step(self):
        table, output = self._optimizer._layers.matrices
        if self._spoiled:
            table.factors = None
            output.factors.output.fill_(float("nan"))
        self._optimizer.step()


def a_consolidated_state_resumes_on_all_ranks(folder):
    settings = {"service": LocalExchange(2), "staleness": SCHEDULED}
    model = seeded(Convolutional)
    optimizer = make(model, **settings)
    train_in_parts(model, optimizer, range(8))
    optimizer.consolidate_state_dict()
    if dist.get_rank() == 0:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "whole.pt")
    dist.barrier()
    train_in_parts(model, optimizer, range(8, 14))
    saved = torch.load(folder / "whole.pt", weights_only=True)
    resumed = seeded(Convolutional, seed=1)
    # Running averages of BatchNorm are each rank's own in part.
    resumed.load_state_dict(saved["model"])
    other = make(resumed, **(settings | {"service": LocalExchange(2)}))
    other.load_state_dict(saved["optimizer"])
    train_in_parts(resumed, other, range(8, 14))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))


def another_number_of_ranks_trains_on_as_if_uninterrupted(folder):
    """One rank from the state of two, and two from that of one: as near as sums in another order are."""
    training = {"auto": train_in_parts, "off": train}

    def begin(kind, distributed):
        model = seeded(kind)
        if kind is Convolutional:
            # In training every replica normalises by its own part of the batch.
            model[1].eval()
        settings = {"service": LocalExchange(2), "staleness": SCHEDULED, "factor_dtype": torch.float32}
        return model, make(model, distributed=distributed, damping=0.1, **settings)

    for kind in (Words, Convolutional):
        for before, after in (("auto", "off"), ("off", "auto")):
            model, optimizer = begin(kind, before)
            training[before](model, optimizer, range(10))
            optimizer.consolidate_state_dict()
            path = folder / f"whole-{before}.pt"
            if dist.get_rank() == 0:
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
            dist.barrier()
            saved = torch.load(path, weights_only=True)
            resumed, other = begin(kind, after)
            resumed.load_state_dict(saved["model"])
            other.load_state_dict(saved["optimizer"])
            assert other.metrics()["blocks_with_version"] == other.metrics()["blocks"] > 0
            start = copy.deepcopy(model)
            training[before](model, optimizer, range(10, 20))
            training[after](resumed, other, range(10, 20))
            assert furthest(start, model) > 0.01
            assert furthest(model, resumed) < 1e-6, (before, furthest(model, resumed))


def torch_saves_and_loads_the_parts_of_all_ranks(folder):
    settings = {"staleness": SCHEDULED}
    model = seeded(Convolutional)
    optimizer = make(model, service=LocalExchange(2), **settings)
    train_in_parts(model, optimizer, range(8))
    state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=folder / "parts")
    train_in_parts(model, optimizer, range(8, 14))
    resumed = seeded(Convolutional, seed=1)
    other = make(resumed, service=LocalExchange(2), **settings)
    state = {"model": resumed.state_dict(), "optimizer": get_optimizer_state_dict(resumed, other)}
    assert other.metrics()["step"] == 0
    dcp.load(state, checkpoint_id=folder / "parts")
    resumed.load_state_dict(state["model"])
    set_optimizer_state_dict(resumed, other, state["optimizer"])
    train_in_parts(resumed, other, range(8, 14))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))


def memory_of_owners_is_as_the_formula_has_it(folder):
    """Every rank owns other blocks, and keeps what hooks record of all layers."""
    bfloat16 = DistributedConfig(communication_dtype=torch.bfloat16, overlap=True)
    for config, dtype in ((DistributedConfig(), torch.float16), (bfloat16, torch.float32)):
        for kind in (
            lambda: Dense(256, 300),
            lambda: Convolutional(channels=16),
            lambda: Words(2000, 64, 100),
        ):
            model = seeded(kind)
            optimizer = make(
                model,
                service=Waiting(),
                staleness=StalenessConfig(refresh_every=2, stagger=False),
                blocking=BlockingConfig(block_size=256),
                distributed=config,
                factor_dtype=dtype,
            )
            estimate = optimizer.estimate_memory()
            as_if = optimizer.estimate_memory(replicas=dist.get_world_size(), replica=dist.get_rank())
            assert as_if == estimate
            examples = batch(model, 0, size=2)
            peaks = peaks_of_training(
                model, optimizer, lambda m=model, e=examples: loss_of(m, *e).backward(), examples
            )
            assert_is_bound(estimate, *peaks)


def sharded_layers_are_refused(folder):
    model = seeded(lambda: Dense(16))
    fully_shard(model)
    optimizer = make(model)
    with pytest.raises(ValueError, match="whole layers"):
        optimizer.estimate_memory()
    with pytest.raises(ValueError, match=r"1\.weight is sharded \(DTensor\): K-FAC needs whole layers"):
        optimizer.state_dict()


SCENARIOS = [
    replicas_train_as_one_process_on_the_whole_batch,
    half_precision_halves_the_bytes,
    layers_have_one_owner_and_replicas_stay_the_same,
    a_replica_without_a_batch_of_a_layer_stays_the_same,
    a_replica_with_an_empty_batch_or_without_a_layer_is_none_to_warn_of,
    an_owner_takes_the_factors_of_layers_that_only_others_used,
    a_consolidated_state_resumes_on_all_ranks,
    another_number_of_ranks_trains_on_as_if_uninterrupted,
    torch_saves_and_loads_the_parts_of_all_ranks,
    memory_of_owners_is_as_the_formula_has_it,
    sharded_layers_are_refused,
]
