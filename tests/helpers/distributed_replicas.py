"""Scenarios of plain parameters that all ranks hold, as under DistributedDataParallel."""

from __future__ import annotations

import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import distributed_accelerators
import distributed_refusals
import distributed_sharing
from distributed_training import (
    EAGER,
    POLICIES,
    SCHEDULED,
    Faulty,
    assert_replicas_are_equal,
    assert_same,
    make_attached,
    make_model,
    make_optimizer,
    on_all_ranks,
    set_gradients,
    train,
)
from preconditioner_client import (
    BlockingConfig,
    DistributedConfig,
    GraftingConfig,
    GroupConfig,
    LocalExchange,
    Shampoo,
    attach,
)
from preconditioner_client.adapters import metrics_source
from scripted_exchange import ScriptedExchange


def pair(**settings):
    """The same training once over all ranks, once on every rank by itself."""
    model, alone = make_model(), make_model()
    return (model, make_optimizer(model, **settings)), (
        alone,
        make_optimizer(alone, distributed="off", **(settings | {"service": LocalExchange(1)})),
    )


def several_ranks_give_the_bits_of_one(folder):
    (model, optimizer), (alone, single) = pair()
    for step in range(20):
        # Parameter 2 has no gradient in some steps; before step 4 nobody looked at parameter 4.
        without = {2} if step % 3 == 1 else {4} if step < 4 else set()
        train(model, optimizer, [step], without)
        train(alone, single, [step], without)
        assert_replicas_are_equal(model)
        assert_same(model, alone)
    assert single.metrics()["versions_adopted"] > 0


def several_ranks_give_the_bits_of_one_in_every_setting(folder):
    for settings in (
        {"staleness": EAGER, "grafting": GraftingConfig(method="lamb"), "momentum": 0.0},
        {"grafting": GraftingConfig(method="sgd", blend_steps=4), "nesterov": True, "beta1": 0.0},
        {"blocking": BlockingConfig(block_size=16, max_side=19), "decoupled_weight_decay": False},
        {"momentum_of": "preconditioned", "dampening": 0.9, "grafting": GraftingConfig(method="adagrad")},
    ):
        (model, optimizer), (alone, single) = pair(**settings)
        train(model, optimizer, range(12))
        train(alone, single, range(12))
        assert_same(model, alone)


def groups_that_are_added_later_have_owners_too(folder):
    models = make_model(), make_model()
    optimizers = [
        Shampoo(
            [{"params": list(m[0].parameters())}, {"params": [m[2].weight], "lr": 0.1, "beta1": 0.0}],
            blocking=BlockingConfig(block_size=8),
            staleness=SCHEDULED,
            service=LocalExchange(),
            distributed=distributed,
        )
        for m, distributed in zip(models, ("auto", "off"), strict=True)
    ]
    for step in range(16):
        for model, optimizer in zip(models, optimizers, strict=True):
            if step == 7:
                optimizer.add_param_group({"params": [model[4].weight]})
            train(model, optimizer, [step])
        assert_same(*models)
        assert_replicas_are_equal(models[0])


def half_precision_parameters(folder):
    model, alone = make_model(torch.bfloat16), make_model(torch.bfloat16)
    train(model, make_optimizer(model), range(12))
    train(alone, make_optimizer(alone, distributed="off"), range(12))
    assert_same(model, alone)


def every_block_has_one_owner_and_the_work_is_balanced(folder):
    exchange = ScriptedExchange()
    job = f"job-{dist.get_rank()}"
    model = make_model()
    optimizer = make_optimizer(model, service=exchange, job=job)
    train(model, optimizer, range(2))
    session = exchange.session
    owned = {b.name: sum(n * n for n in b.sides) for b in session.blocks}
    told = on_all_ranks((owned, session.rank, session.world_size, session.epoch, session.job))
    alone = make_model()
    everything = ScriptedExchange()
    train(alone, make_optimizer(alone, service=everything, distributed="off"), range(1))
    names = [name for owned, *_ in told for name in owned]
    assert sorted(names) == sorted(b.name for b in everything.session.blocks)
    assert [rank for _, rank, *_ in told] == list(range(dist.get_world_size()))
    assert {tuple(rest) for _, _, *rest in told} == {(dist.get_world_size(), session.epoch, "job-0")}
    work = [sum(owned.values()) for owned, *_ in told]
    assert max(work) <= 1.5 * min(work)
    assert optimizer.metrics()["blocks"] == len(owned)
    # A new life of the session has a new epoch, again the same on all ranks.
    optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, range(2, 3))
    epochs = on_all_ranks(exchange.session.epoch)
    assert len(set(epochs)) == 1
    assert epochs[0] > session.epoch


def replicas_stay_bit_identical_whatever_arrives_when(folder):
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    for staleness in POLICIES:
        model, undisturbed, overlapped = make_model(), make_model(), make_model()
        optimizer = make_optimizer(model, staleness=staleness, service=Faulty(rank))
        bucketed = make_optimizer(
            overlapped,
            staleness=staleness,
            service=Faulty(rank),
            distributed=DistributedConfig(overlap=True, bucket_bytes=300),
        )
        reference = make_optimizer(undisturbed, staleness=staleness)
        for step in range(30):
            train(model, optimizer, [step])
            train(undisturbed, reference, [step])
            assert_replicas_are_equal(model)
            if staleness.policy == "graft":
                train(overlapped, bucketed, [step])
                assert_same(overlapped, model)
        assert not torch.equal(model[0].weight, undisturbed[0].weight), "the faults did nothing"
        stale = on_all_ranks(optimizer.metrics()["age_max"])
        assert stale[last] > stale[0]


def attached_replicas_stay_bit_identical_whatever_arrives_when(folder):
    """Each rank has its own part of the batch, and its own faults."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(18, 8 * dist.get_world_size(), 12, generator=generator)
    own = x[:, dist.get_rank() :: dist.get_world_size()]

    def trained(staleness, service):
        model = make_model()
        optimizer, handle = make_attached(model, staleness=staleness, service=service)
        parallel = DistributedDataParallel(model)
        for batch in own:
            optimizer.zero_grad()
            parallel(batch).sub(batch[:, :8]).square().mean().backward()
            optimizer.step()
            assert_replicas_are_equal(model)
        return model, on_all_ranks(handle.metrics()["age_max"])

    for staleness in POLICIES:
        model, ages = trained(staleness, Faulty(dist.get_rank()))
        undisturbed, _ = trained(staleness, LocalExchange(1))
        assert not torch.equal(model[0].weight, undisturbed[0].weight), "the faults did nothing"
        assert ages[-1] > ages[0]


def an_exchange_that_never_answers_at_one_rank(folder):
    exchange = ScriptedExchange() if dist.get_rank() == 1 else LocalExchange()
    model = make_model()
    optimizer = make_optimizer(model, staleness=EAGER, service=exchange)
    for step in range(12):
        train(model, optimizer, [step])
        assert_replicas_are_equal(model)
    with_version = on_all_ranks(optimizer.metrics()["blocks_with_version"])
    assert with_version[1] == 0
    assert with_version[0] > 0


def under_distributed_data_parallel(folder):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))
    net[2].register_parameter("unused", nn.Parameter(torch.ones(4, 4)))
    model = DistributedDataParallel(net, find_unused_parameters=True)
    optimizer = Shampoo(
        model.named_parameters(), lr=1e-2, blocking=BlockingConfig(block_size=8), service=LocalExchange(1)
    )
    generator = torch.Generator().manual_seed(dist.get_rank())
    losses = []
    for _ in range(40):
        x = torch.randn(16, 12, generator=generator)
        loss = model(x).sub(x[:, :4]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert_replicas_are_equal(net)
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def options_of_distributed_data_parallel_change_no_bit(folder):
    """Also where gradients are views of its buckets, and reduced only with the last of several batches."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(10, 3, 8, 12, generator=generator)
    for make in (make_optimizer, lambda model: make_attached(model)[0]):
        trained = []
        for options in (
            {},
            {"gradient_as_bucket_view": True},
            {"gradient_as_bucket_view": True, "find_unused_parameters": True},
        ):
            model = make_model()
            optimizer = make(model)
            parallel = DistributedDataParallel(model, **options)
            for *first, last in x:
                optimizer.zero_grad()
                with parallel.no_sync():
                    for batch in first:
                        parallel(batch).square().mean().backward()
                parallel(last).square().mean().backward()
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
            assert metrics_source(optimizer).metrics()["versions_adopted"] > 0
            assert_replicas_are_equal(model)
            trained.append(model)
        for model in trained[1:]:
            assert_same(model, trained[0])


def an_attached_preconditioner_shares_its_blocks(folder):
    models = make_model(), make_model()
    optimizers = []
    for model, distributed in zip(models, ("auto", "off"), strict=True):
        optimizers.append(torch.optim.SGD(model.parameters(), lr=1e-2))
        attach(
            optimizers[-1],
            model,
            blocking=BlockingConfig(block_size=8),
            staleness=EAGER,
            service=LocalExchange(),
            distributed=distributed,
        )
    for step in range(10):
        for model, optimizer in zip(models, optimizers, strict=True):
            train(model, optimizer, [step])
        assert_replicas_are_equal(models[0])
        assert_same(*models)


def a_group_left_alone_is_shared_with_nobody(folder):
    """Where they differ among ranks, its gradients stay those of each; the other groups have owners."""
    models, seen = (make_model(), make_model()), []
    for overlap in (False, True):
        model = models[overlap]
        optimizer, handle = make_attached(
            model,
            cuts=(2, 4),
            groups={0: None, 2: GroupConfig(blocking=BlockingConfig(block_size=4)), 3: None},
            distributed=DistributedConfig(overlap=overlap, bucket_bytes=600),
        )
        complex_ones = [nn.Parameter(torch.ones(3, dtype=d)) for d in (torch.complex64, torch.complex128)]
        optimizer.add_param_group({"params": complex_ones})
        optimizer.register_step_pre_hook(
            lambda *_, of=model: seen.append([p.grad.clone() for p in of.parameters()])
        )
        for step in range(8):
            set_gradients(model, step)
            for parameter in complex_ones:
                parameter.grad = torch.ones_like(parameter)
            for parameter in model[0].parameters():
                parameter.grad += dist.get_rank()
            given = [p.grad.clone() for p in model.parameters()]
            optimizer.step()
            assert all(torch.equal(a, b) for a, b in zip(seen[-1][:2], given[:2], strict=True))
            assert not any(torch.equal(a, b) for a, b in zip(seen[-1][2:4], given[2:4], strict=True))
        assert_replicas_are_equal(model[2:])
        # (16, 20) in blocks of 8 and (8, 16) in blocks of 4, shared among the ranks.
        assert sum(on_all_ranks(handle.metrics()["blocks"])) == 6 + 8
    assert_same(*models)


def a_process_group_of_some_ranks(folder):
    group = dist.new_group([0, 1])
    if dist.get_rank() > 1:
        return
    model = make_model()
    optimizer = make_optimizer(model, distributed=DistributedConfig(process_group=group))
    train(model, optimizer, range(8))
    alone = make_model()
    train(alone, make_optimizer(alone, distributed="off"), range(8))
    assert_same(model, alone)


def no_warning(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = make_model()
        train(model, make_optimizer(model), range(4))


SCENARIOS = [
    several_ranks_give_the_bits_of_one,
    several_ranks_give_the_bits_of_one_in_every_setting,
    groups_that_are_added_later_have_owners_too,
    half_precision_parameters,
    every_block_has_one_owner_and_the_work_is_balanced,
    replicas_stay_bit_identical_whatever_arrives_when,
    attached_replicas_stay_bit_identical_whatever_arrives_when,
    an_exchange_that_never_answers_at_one_rank,
    under_distributed_data_parallel,
    options_of_distributed_data_parallel_change_no_bit,
    an_attached_preconditioner_shares_its_blocks,
    a_group_left_alone_is_shared_with_nobody,
    a_process_group_of_some_ranks,
    no_warning,
    *distributed_sharing.SCENARIOS,
    *distributed_refusals.SCENARIOS,
    *distributed_accelerators.SCENARIOS,
]

ON_FOUR_RANKS = [
    several_ranks_give_the_bits_of_one,
    every_block_has_one_owner_and_the_work_is_balanced,
    replicas_stay_bit_identical_whatever_arrives_when,
    attached_replicas_stay_bit_identical_whatever_arrives_when,
    an_exchange_that_never_answers_at_one_rank,
    under_distributed_data_parallel,
    a_process_group_of_some_ranks,
    *distributed_sharing.ON_FOUR_RANKS,
    *distributed_refusals.ON_FOUR_RANKS,
]
"""Those in which it matters how many there are."""
