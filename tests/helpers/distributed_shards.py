"""Scenarios of ``fully_shard``: rows of parameters divided among ranks, also in meshes of two dimensions."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from distributed_full_states import (
    a_consolidated_state_is_whole_in_a_full_state_dict_of_torch,
    a_full_state_dict_of_torch_without_the_whole_on_rank_0_is_warned_of,
    whole_state_by_torch,
)
from distributed_shard_checkpoints import (
    a_checkpoint_that_is_written_beside_training_is_of_its_step,
    a_consolidated_state_is_saved_by_torch,
    a_consolidated_state_of_shards_loads_everywhere,
    a_part_of_other_shards_is_refused_by_name,
    another_number_of_ranks_keeps_what_it_can,
    moments_are_resharded_exactly,
    parameters_without_gradients_have_lost_no_statistics,
    shards_of_replicas_resume_bit_for_bit,
    shards_resume_bit_for_bit_with_torch,
    what_a_rank_gives_after_a_consolidation_is_not_loaded_into,
)
from distributed_training import (
    EAGER,
    POLICIES,
    SCHEDULED,
    Faulty,
    gradient,
    make_attached,
    make_optimizer,
    on_all_ranks,
)
from live_tensors import Waiting, peak_of_steps
from preconditioner_client import (
    BlockingConfig,
    GraftingConfig,
    LocalExchange,
    Shampoo,
    StalenessConfig,
    attach,
)
from scripted_exchange import ScriptedExchange
from sharded_training import (
    aligned,
    alone,
    assert_same,
    mesh_of,
    shard,
    sharded,
    train,
    uneven,
    whole,
)


def shards_give_the_bits_of_one_process_where_their_blocks_are_the_same(folder):
    for settings in {}, {"momentum": 0.9, "dampening": 0.9, "momentum_of": "preconditioned"}:
        model, optimizer = sharded(aligned, **settings)
        single, reference = alone(aligned, **settings)
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


def shards_of_tensor_parallel_parameters_are_refused_by_name(folder):
    """Where ``fully_shard`` divides the rows that tensor parallelism has divided already."""
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("data", "tensor"))
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 12))
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(model, mesh=mesh["data"])
    with pytest.raises(ValueError, match=r"0\.weight has the placements \(_StridedShard"):
        make_optimizer(model).state_dict()
    with pytest.raises(ValueError, match=r"2\.weight has the placements \(Shard\(dim=0\), Shard\(dim=1\)\)"):
        make_optimizer(model[2:]).state_dict()


def plain_parameters_beside_shards_are_refused_by_name(folder):
    model = aligned()
    fully_shard(model[2], mesh=mesh_of("fsdp"))
    with pytest.raises(ValueError, match=r"0\.weight is a plain tensor beside DTensor parameters"):
        make_optimizer(model).state_dict()


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
    a_checkpoint_that_is_written_beside_training_is_of_its_step,
    a_consolidated_state_of_shards_loads_everywhere,
    a_part_of_other_shards_is_refused_by_name,
    whole_state_by_torch,
    a_consolidated_state_is_whole_in_a_full_state_dict_of_torch,
    a_full_state_dict_of_torch_without_the_whole_on_rank_0_is_warned_of,
    a_consolidated_state_is_saved_by_torch,
    what_a_rank_gives_after_a_consolidation_is_not_loaded_into,
    parameters_without_gradients_have_lost_no_statistics,
]


ON_FOUR_RANKS = [
    shards_give_the_bits_of_one_process_where_their_blocks_are_the_same,
    groups_of_shards_share_one_mesh,
    uneven_and_empty_shards,
    layer_wise_grafting_takes_norms_over_all_shards,
    shards_of_tensor_parallel_parameters_are_refused_by_name,
    another_number_of_ranks_keeps_what_it_can,
    moments_are_resharded_exactly,
    shards_of_replicas_give_the_bits_of_one_process,
    replicas_of_shards_stay_bit_identical_whatever_arrives_when,
    memory_of_shards_is_as_the_formula_has_it,
    shards_of_replicas_resume_bit_for_bit,
]


SCENARIOS = [*ON_TWO_RANKS, *(s for s in ON_FOUR_RANKS if s not in ON_TWO_RANKS)]
