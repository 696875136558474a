"""Scenarios of ``fully_shard``: rows of parameters divided among ranks, also in meshes of two dimensions."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

from distributed_training import (
    EAGER,
    POLICIES,
    SCHEDULED,
    Faulty,
    gradient,
    make_attached,
    make_optimizer,
    on_all_ranks,
    set_gradients,
)
from live_tensors import Waiting, peak_of_steps
from preconditioner_client import (
    BlockingConfig,
    GraftingConfig,
    LocalExchange,
    Shampoo,
    StalenessConfig,
    StatisticsConfig,
    attach,
)
from scripted_exchange import ScriptedExchange

STOP, END = 10, 24


def aligned():
    """Shards of these rows on 2 and 4 ranks are cut into the same blocks as the whole."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 64), nn.LayerNorm(64))


def uneven():
    """Rows that neither 2 nor 4 ranks divide; one parameter has fewer rows than there are ranks."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 19), nn.Tanh(), nn.Linear(19, 13), nn.Tanh(), nn.Linear(13, 1))


def mesh_of(kind):
    size = dist.get_world_size()
    if kind == "hsdp":
        return init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh("cpu", (size,))


def shard(model, kind="fsdp"):
    mesh = mesh_of(kind)
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def sharded(make, kind="fsdp", **settings):
    model = shard(make(), kind)
    return model, make_optimizer(model, **settings)


def alone(make, **settings):
    model = make()
    return model, make_optimizer(model, distributed="off", **settings)


def train(model, optimizer, steps):
    """Gradients are the same whole ones everywhere; every rank is given its rows of them."""
    for step in steps:
        set_gradients(model, step)
        for index, p in enumerate(model.parameters()):
            if isinstance(p, DTensor):
                p.grad = distribute_tensor(gradient(p.shape, index, step), p.device_mesh, p.placements)
        optimizer.step()


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def assert_same(model, other, **tolerance):
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        a, b = whole(a), whole(b)
        if tolerance:
            torch.testing.assert_close(a, b, **tolerance)
        else:
            assert torch.equal(a, b), f"{name}: up to {(a - b).abs().max()}"


def shards_give_the_bits_of_one_process_where_their_blocks_are_the_same(folder):
    model, optimizer = sharded(aligned)
    single, reference = alone(aligned)
    for step in range(16):
        train(model, optimizer, [step])
        train(single, reference, [step])
        assert_same(model, single)
    blocks = on_all_ranks(optimizer.metrics()["blocks"])
    assert sum(blocks) == reference.metrics()["blocks"]
    assert min(blocks) > 0


def groups_of_shards_share_one_mesh(folder):
    for kind in ("fsdp", "hsdp"):
        model, other = aligned(), aligned()
        mesh = mesh_of(kind)
        for layer in model[0], model[2], model:
            fully_shard(layer, mesh=mesh)
        optimizers = []
        for net, distributed in ((model, "auto"), (other, "off")):
            parameters = dict(net.named_parameters())
            decayed = {name: p for name, p in parameters.items() if p.ndim > 1}
            rest = {name: p for name, p in parameters.items() if p.ndim == 1}
            groups = [
                {"params": list(decayed.items()), "weight_decay": 0.1},
                {"params": list(rest.items()), "weight_decay": 0.0, "beta1": 0.5},
            ]
            optimizers.append(
                Shampoo(
                    groups,
                    lr=1e-2,
                    blocking=BlockingConfig(block_size=8),
                    staleness=SCHEDULED,
                    service=LocalExchange(1),
                    distributed=distributed,
                )
            )
        train(model, optimizers[0], range(12))
        train(other, optimizers[1], range(12))
        assert_same(model, other)


def uneven_and_empty_shards(folder):
    exchange = ScriptedExchange()
    model, optimizer = sharded(uneven, service=exchange)
    rows = on_all_ranks(model[4].weight.to_local().shape[0])
    assert 0 in rows
    # Without any version only elementwise arithmetic is done, and that is the same bits in any shard.
    single, reference = alone(uneven, service=ScriptedExchange())
    train(model, optimizer, range(6))
    train(single, reference, range(6))
    assert_same(model, single)
    names = [b.name for b in exchange.session.blocks] if exchange.session else []
    told = [name for names in on_all_ranks(names) for name in names]
    assert len(set(told)) == len(told), "a block has two owners"
    model, optimizer = sharded(uneven, service=LocalExchange(1))
    train(model, optimizer, range(12))
    assert all(bool(whole(p).isfinite().all()) for p in model.parameters())
    assert sum(on_all_ranks(optimizer.metrics()["versions_adopted"])) > 0


def training_with_backward(folder):
    """Every rank has its part of the batch; one process has all of it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32 * dist.get_world_size(), 12, generator=generator)
    own = x[dist.get_rank() :: dist.get_world_size()]
    settings = {"staleness": EAGER, "lr": 1e-3}
    losses = []
    for (model, optimizer), batch in ((sharded(aligned, **settings), own), (alone(aligned, **settings), x)):
        losses.append([])
        for _ in range(30):
            loss = model(batch).sub(batch[:, :1]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(sum(on_all_ranks(loss.item())) / dist.get_world_size())
    assert losses[0][-1] < 0.9 * losses[0][0]
    # Gradients are summed in another order.
    torch.testing.assert_close(*losses, rtol=1e-3, atol=0)


def layer_wise_grafting_takes_norms_over_all_shards(folder):
    for method in ("lars", "lamb"):
        settings = {"grafting": GraftingConfig(method=method, trust_coefficient=0.1), "lr": 1e-2}
        model, optimizer = sharded(uneven, service=ScriptedExchange(), **settings)
        single, reference = alone(uneven, service=ScriptedExchange(), **settings)
        train(model, optimizer, range(5))
        train(single, reference, range(5))
        # Sums over shards are rounded in another order.
        assert_same(model, single, rtol=1e-4, atol=1e-6)


def a_warm_up_from_zero_steps_on_every_rank(folder):
    """While the rate is 0 a rank without rows, or without gradients in its rows, steps as the others do."""
    torch.manual_seed(0)
    x = torch.randn(8, 13)
    for make, part in ((lambda: nn.Linear(13, 1), 13), (lambda: nn.Linear(13, 4, bias=False), 1)):
        for attached in (False, True):
            torch.manual_seed(0)
            model = make()
            fully_shard(model, mesh=mesh_of("fsdp"))
            if attached:
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
                source = attach(optimizer, model, service=LocalExchange())
            else:
                source = optimizer = Shampoo(model.named_parameters(), lr=0.1, service=LocalExchange())
            # What a checkpoint asks for on one rank before the first step leaves state there.
            if dist.get_rank() == 0:
                optimizer.state_dict()
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 2))
            for _ in range(4):
                optimizer.zero_grad()
                # Of the second model's outputs only the first, which the first rank holds, has a gradient.
                model(x)[:, :part].square().mean().backward()
                optimizer.step()
                scheduler.step()
            assert source.metrics()["step"] == 4


def half_precision_shards(folder):
    model = aligned().to(torch.bfloat16)
    fully_shard(model, mesh=mesh_of("fsdp"))
    optimizer = make_optimizer(model)
    for step in range(8):
        for index, p in enumerate(model.parameters()):
            whole_gradient = gradient(p.shape, index, step).to(torch.bfloat16)
            p.grad = distribute_tensor(whole_gradient, p.device_mesh, p.placements)
        optimizer.step()
    state = optimizer.state[model[0].weight]["exp_avg"]
    assert state.dtype == torch.float32
    assert isinstance(state, DTensor)


def a_gradient_that_is_not_finite_is_refused_by_all_ranks(folder):
    model, optimizer = sharded(uneven)
    train(model, optimizer, range(3))
    before = [whole(p).clone() for p in model.parameters()]
    for index, p in enumerate(model.parameters()):
        p.grad = distribute_tensor(gradient(p.shape, index, 3), p.device_mesh, p.placements)
    if dist.get_rank() == 0:
        model[2].weight.grad.to_local()[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"gradient of 2\.weight holds (1|on another rank) NaN or infinite"):
        optimizer.step()
    assert all(torch.equal(a, whole(b)) for a, b in zip(before, model.parameters(), strict=True))
    assert optimizer.metrics()["step"] == 3


def placements_that_are_not_supported_are_refused_by_name(folder):
    mesh = mesh_of("fsdp")
    for placement in (Shard(1), Partial()):
        p = nn.Parameter(DTensor.from_local(torch.ones(4, 4), mesh, [placement], run_check=False))
        p.grad = torch.zeros_like(p)
        optimizer = make_optimizer(nn.Linear(2, 2))
        optimizer.add_param_group({"params": [("decoder", p)]})
        with pytest.raises(ValueError, match=r"decoder has the placements \((Shard\(dim=1\)|Partial)"):
            optimizer.state_dict()


def plain_parameters_beside_shards_are_refused_by_name(folder):
    model = aligned()
    fully_shard(model[2], mesh=mesh_of("fsdp"))
    with pytest.raises(ValueError, match=r"0\.weight is a plain tensor beside DTensor parameters"):
        make_optimizer(model).state_dict()


def state_of(model, optimizer, options=None):
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }


def load(model, optimizer, path, options=None, partial=False):
    state = state_of(model, optimizer, options)
    dcp.load(state, checkpoint_id=path, planner=DefaultLoadPlanner(allow_partial_load=partial))
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)


OPTIONS = {"nested": StateDictOptions(), "flat": StateDictOptions(flatten_optimizer_state_dict=True)}


def shards_resume_bit_for_bit_with_torch(folder):
    for make in (aligned, uneven):
        uninterrupted = sharded(make)
        train(*uninterrupted, range(END))
        model, optimizer = sharded(make)
        train(model, optimizer, range(STOP))
        for name, options in OPTIONS.items():
            path = folder / f"shards-{make.__name__}-{name}"
            dcp.save(state_of(model, optimizer, options), checkpoint_id=path)
            resumed = sharded(make)
            load(*resumed, path, options)
            assert resumed[1].metrics()["step"] == STOP
            train(*resumed, range(STOP, END))
            assert_same(resumed[0], uninterrupted[0])
            assert resumed[1].metrics()["waits"] == 0


def a_consolidated_state_of_shards_loads_everywhere(folder):
    model, optimizer = sharded(aligned)
    train(model, optimizer, range(STOP))
    weights = {name: whole(p).clone() for name, p in model.named_parameters()}
    optimizer.consolidate_state_dict()
    if dist.get_rank() == 0:
        torch.save({"model": weights, "optimizer": optimizer.state_dict()}, folder / "shards-whole.pt")
    dist.barrier()
    state = torch.load(folder / "shards-whole.pt", weights_only=True)
    uninterrupted, reference = alone(aligned)
    train(uninterrupted, reference, range(END))

    single, other = alone(aligned)
    single.load_state_dict(state["model"])
    other.load_state_dict(state["optimizer"])
    train(single, other, range(STOP, END))
    assert_same(single, uninterrupted)

    again, third = sharded(aligned)
    for name, p in again.named_parameters():
        p.data.copy_(distribute_tensor(state["model"][name], p.device_mesh, p.placements))
    third.load_state_dict(state["optimizer"])
    train(again, third, range(STOP, END))
    assert_same(again, uninterrupted)


def a_part_of_other_shards_is_refused_by_name(folder):
    model, optimizer = sharded(uneven)
    train(model, optimizer, range(2))
    state = optimizer.state_dict()
    key = model[0].weight
    torch.manual_seed(0)
    parts = on_all_ranks(tuple(key.to_local().shape))
    assert len(set(parts)) > 1
    local = state["state"][0]["exp_avg"].to_local()
    state["state"][0]["exp_avg"] = DTensor.from_local(
        local[:1].clone(),
        key.device_mesh,
        key.placements,
        run_check=False,
        shape=key.shape,
        stride=key.stride(),
    )
    with pytest.raises(
        ValueError, match=r"0\.weight: exp_avg in the checkpoint is one rank's part \(1, 12\)"
    ):
        sharded(uneven)[1].load_state_dict(state)


def assert_replicas_hold_the_same_bits(model):
    """Of every shard."""
    held = torch.cat([p.to_local().detach().reshape(-1) for p in model.parameters()])
    replicas = [torch.empty_like(held) for _ in range(2)]
    dist.all_gather(replicas, held, group=model[0].weight.device_mesh.get_group("replicate"))
    assert torch.equal(*replicas)


def shards_of_replicas_give_the_bits_of_one_process(folder):
    exchange = ScriptedExchange()
    model, optimizer = sharded(aligned, "hsdp")
    single, reference = alone(aligned)
    for step in range(12):
        train(model, optimizer, [step])
        train(single, reference, [step])
        assert_same(model, single)
        assert_replicas_hold_the_same_bits(model)
    optimizer.consolidate_state_dict()
    if dist.get_rank() == 0:
        states, expected = optimizer.state_dict()["state"], reference.state_dict()["state"]
        for index, state in states.items():
            assert state.keys() == expected[index].keys()
            for key, value in state.items():
                same = torch.equal(value, expected[index][key]) if torch.is_tensor(value) else None
                assert same or value == expected[index][key], key
    model, optimizer = sharded(aligned, "hsdp", service=exchange)
    train(model, optimizer, range(1))
    told = on_all_ranks(
        (exchange.session.rank, [b.name for b in exchange.session.blocks], exchange.session.epoch)
    )
    assert [rank for rank, *_ in told] == list(range(dist.get_world_size()))
    names = [name for _, names, _ in told for name in names]
    assert len(names) == len(set(names)) == reference.metrics()["blocks"]
    assert len({epoch for *_, epoch in told}) == 1


def replicas_of_shards_stay_bit_identical_whatever_arrives_when(folder):
    """Each rank has its own part of the batch, and faults of its own: two shards, two replicas of each."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(18, 8 * dist.get_world_size(), 12, generator=generator)
    own = x[:, dist.get_rank() :: dist.get_world_size()]

    def trained(attached, staleness, service):
        model = shard(uneven(), "hsdp")
        if attached:
            optimizer, source = make_attached(model, staleness=staleness, service=service)
        else:
            source = optimizer = make_optimizer(model, staleness=staleness, service=service)
        for batch in own:
            optimizer.zero_grad()
            model(batch).sub(batch[:, :1]).square().mean().backward()
            optimizer.step()
            assert_replicas_hold_the_same_bits(model)
        return whole(model[0].weight), on_all_ranks(source.metrics()["age_max"])

    for attached, staleness in (*((False, policy) for policy in POLICIES), (True, POLICIES[0])):
        weight, ages = trained(attached, staleness, Faulty(dist.get_rank()))
        undisturbed, _ = trained(attached, staleness, LocalExchange(1))
        assert not torch.equal(weight, undisturbed), "the faults did nothing"
        assert max(ages[1:]) > ages[0]


def memory_of_shards_is_as_the_formula_has_it(folder):
    """On two ranks as shards, on four as replicas of shards, too; some hold no block of the last layer."""
    for kind in ("fsdp", "hsdp") if dist.get_world_size() == 4 else ("fsdp",):
        for settings in ({}, {"grafting": GraftingConfig(method="lamb"), "momentum": 0.9, "nesterov": True}):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(256, 512), nn.Tanh(), nn.Linear(512, 96), nn.Linear(96, 1))
            shard(model, kind)
            optimizer = Shampoo(
                model.named_parameters(),
                blocking=BlockingConfig(block_size=128),
                staleness=StalenessConfig(refresh_every=2, stagger=False),
                service=Waiting(),
                **settings,
            )
            estimate = optimizer.estimate_memory()
            expected = estimate.total - estimate.in_flight
            measured = peak_of_steps(optimizer)
            ratios = on_all_ranks(expected / measured)
            assert all(1 <= ratio <= 1.3 for ratio in ratios), (kind, ratios, measured, estimate)


def shards_of_replicas_resume_bit_for_bit(folder):
    uninterrupted = sharded(uneven, "hsdp")
    train(*uninterrupted, range(END))
    model, optimizer = sharded(uneven, "hsdp")
    train(model, optimizer, range(STOP))
    dcp.save(state_of(model, optimizer), checkpoint_id=folder / "hsdp")
    resumed = sharded(uneven, "hsdp")
    load(*resumed, folder / "hsdp")
    train(*resumed, range(STOP, END))
    assert_same(resumed[0], uninterrupted[0])


class Warnings(logging.Handler):
    """What the client logged in a ``with`` block."""

    def __init__(self):
        super().__init__()
        self.messages = []

    def __enter__(self):
        logging.getLogger("preconditioner_client").addHandler(self)
        return self

    def __exit__(self, *_):
        logging.getLogger("preconditioner_client").removeHandler(self)

    def emit(self, record):
        self.messages.append(record.getMessage())


def another_number_of_ranks_keeps_what_it_can(folder):
    """Reads what two ranks saved."""
    for make, lost in ((aligned, False), (uneven, True)):
        with Warnings() as log:
            model, optimizer = sharded(make)
            load(model, optimizer, folder / f"shards-{make.__name__}-nested", partial=True)
        warned = [m for m in log.messages if "start with new statistics" in m]
        single, reference = alone(make, service=ScriptedExchange())
        train(single, reference, range(STOP))
        for p, q in zip(model.parameters(), single.parameters(), strict=True):
            state, expected = optimizer.state[p], reference.state[q]
            assert state["step"] == expected["step"] == STOP
        counts = on_all_ranks(len(warned))
        assert max(counts) <= 1
        assert bool(sum(counts)) == lost, log.messages
        train(model, optimizer, range(STOP, END))
        assert all(bool(whole(p).isfinite().all()) for p in model.parameters())
        if not lost:
            uninterrupted = alone(make)
            train(*uninterrupted, range(END))
            assert_same(model, uninterrupted[0])


def moments_are_resharded_exactly(folder):
    """Reads what two ranks saved: moments do not depend on what was preconditioned."""
    model, optimizer = sharded(uneven)
    load(model, optimizer, folder / "shards-uneven-nested", partial=True)
    single, reference = alone(uneven, service=ScriptedExchange())
    train(single, reference, range(STOP))
    for p, q in zip(model.parameters(), single.parameters(), strict=True):
        for key in ("exp_avg", "second_moment"):
            assert torch.equal(whole(optimizer.state[p][key]), reference.state[q][key])


FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
BROADCAST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def resumed_from_full(make, state, weights):
    """A new model and optimizer from a full state dict on rank 0, and what was logged meanwhile."""
    model, optimizer = make()
    for p, value in zip(model.parameters(), weights, strict=True):
        p.data.copy_(
            distribute_tensor(value, p.device_mesh, p.placements) if isinstance(p, DTensor) else value
        )
    with Warnings() as log:
        set_optimizer_state_dict(model, optimizer, state if dist.get_rank() == 0 else {}, options=BROADCAST)
    return model, optimizer, log.messages


def replicas():
    model = aligned()
    return model, make_optimizer(model)


def whole_state_by_torch(folder):
    """A full state dict on rank 0, as torch gathers it: moments are whole, blocks are rank 0's."""
    for make in (lambda: sharded(aligned), replicas):
        model, optimizer = make()
        train(model, optimizer, range(STOP))
        with Warnings() as log:
            state = get_optimizer_state_dict(model, optimizer, options=FULL)
        # DTensors are gathered without a warning, so only of replicas it is known that parts will lack.
        assert ["full_state_dict" in message for message in log.messages] == [True] * (make is replicas)
        assert not any(isinstance(v, DTensor) for s in state.get("state", {}).values() for v in s.values())
        weights = [whole(p).detach().clone() for p in model.parameters()]
        other, resumed, logged = resumed_from_full(make, state, weights)
        assert resumed.metrics()["step"] == STOP
        if dist.get_rank() == 0:
            assert not logged
            assert resumed.metrics()["blocks_with_version"] == resumed.metrics()["blocks"]
        else:
            blocks = resumed.metrics()["blocks"]
            (warning,) = logged
            assert warning.startswith(f"{blocks} of {blocks} blocks of this rank start with new statistics")
            assert "full_state_dict" in warning
            assert "consolidate_state_dict()" in warning
        train(other, resumed, range(STOP, END))


def a_consolidated_state_is_whole_in_a_full_state_dict_of_torch(folder):
    for make in (lambda: sharded(aligned), replicas):
        model, optimizer = make()
        train(model, optimizer, range(STOP))
        weights = [whole(p).detach().clone() for p in model.parameters()]
        optimizer.consolidate_state_dict()
        # Asking does not change what the next one is told.
        for _ in range(2):
            state = get_optimizer_state_dict(model, optimizer, options=FULL)
        other, resumed, logged = resumed_from_full(make, state, weights)
        assert not logged
        train(model, optimizer, range(STOP, END))
        train(other, resumed, range(STOP, END))
        assert_same(other, model)


def a_consolidated_state_is_saved_by_torch(folder):
    model, optimizer = sharded(uneven)
    train(model, optimizer, range(STOP))
    optimizer.consolidate_state_dict()
    for name, options in OPTIONS.items():
        dcp.save(state_of(model, optimizer, options), checkpoint_id=folder / f"consolidated-{name}")
    train(model, optimizer, range(STOP, END))
    for name, options in OPTIONS.items():
        resumed = sharded(uneven)
        load(*resumed, folder / f"consolidated-{name}", options)
        train(*resumed, range(STOP, END))
        assert_same(resumed[0], model)


def what_a_rank_gives_after_a_consolidation_is_not_loaded_into(folder):
    model, optimizer = sharded(aligned)
    train(model, optimizer, range(STOP))
    path = folder / "before-a-consolidation"
    dcp.save(state_of(model, optimizer), checkpoint_id=path)
    optimizer.consolidate_state_dict()
    if dist.get_rank() == 0:
        load(model, optimizer, path)
    else:
        with pytest.raises(ValueError, match=r"consolidate_state_dict\(\) was called since the last step"):
            load(model, optimizer, path)


def parameters_without_gradients_have_lost_no_statistics(folder):
    """Neither one that never had any, nor one that had none in the steps that statistics take."""
    for every, without in ((1, lambda step: {2, 3}), (4, lambda step: {2} if step % 4 == 3 else set())):

        def make(every=every):
            return sharded(aligned, statistics=StatisticsConfig(every=every))

        model, optimizer = make()
        for step in range(8):
            set_gradients(model, step, without(step))
            for index, p in enumerate(model.parameters()):
                if p.grad is not None:
                    p.grad = distribute_tensor(gradient(p.shape, index, step), p.device_mesh, p.placements)
            optimizer.step()
        path = folder / f"without-gradients-{every}"
        dcp.save(state_of(model, optimizer), checkpoint_id=path)
        with Warnings() as log:
            resumed = make()
            load(*resumed, path)
        assert resumed[1].metrics()["step"] == 8
        assert not log.messages


ON_TWO_RANKS = [
    shards_give_the_bits_of_one_process_where_their_blocks_are_the_same,
    training_with_backward,
    a_warm_up_from_zero_steps_on_every_rank,
    memory_of_shards_is_as_the_formula_has_it,
    half_precision_shards,
    a_gradient_that_is_not_finite_is_refused_by_all_ranks,
    placements_that_are_not_supported_are_refused_by_name,
    plain_parameters_beside_shards_are_refused_by_name,
    shards_resume_bit_for_bit_with_torch,
    a_consolidated_state_of_shards_loads_everywhere,
    a_part_of_other_shards_is_refused_by_name,
    whole_state_by_torch,
    a_consolidated_state_is_whole_in_a_full_state_dict_of_torch,
    a_consolidated_state_is_saved_by_torch,
    what_a_rank_gives_after_a_consolidation_is_not_loaded_into,
    parameters_without_gradients_have_lost_no_statistics,
]
ON_FOUR_RANKS = [
    shards_give_the_bits_of_one_process_where_their_blocks_are_the_same,
    groups_of_shards_share_one_mesh,
    uneven_and_empty_shards,
    layer_wise_grafting_takes_norms_over_all_shards,
    another_number_of_ranks_keeps_what_it_can,
    moments_are_resharded_exactly,
    shards_of_replicas_give_the_bits_of_one_process,
    replicas_of_shards_stay_bit_identical_whatever_arrives_when,
    memory_of_shards_is_as_the_formula_has_it,
    shards_of_replicas_resume_bit_for_bit,
]
SCENARIOS = [*ON_TWO_RANKS, *(s for s in ON_FOUR_RANKS if s not in ON_TWO_RANKS)]
