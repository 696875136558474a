"""Scenarios of plain parameters that all ranks hold, as under DistributedDataParallel."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distributed_accelerators import SCENARIOS as ON_ACCELERATORS
from distributed_training import (
    EAGER,
    POLICIES,
    SCHEDULED,
    Faulty,
    assert_replicas_are_equal,
    make_attached,
    make_model,
    make_optimizer,
    on_all_ranks,
    set_gradients,
    train,
    weights,
)
from live_tensors import Waiting, peak_of_steps
from preconditioner_client import (
    BlockingConfig,
    DistributedConfig,
    GraftingConfig,
    GroupConfig,
    LocalExchange,
    Shampoo,
    StalenessConfig,
    attach,
)
from scripted_exchange import ScriptedExchange


def assert_same(model, other):
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), f"{name}: up to {(a - b).abs().max()}"


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


def bfloat16_communication_rounds_on_all_ranks_alike(folder):
    config = DistributedConfig(communication_dtype=torch.bfloat16)
    model, exact = make_model(), make_model()
    optimizer = make_optimizer(model, distributed=config)
    reference = make_optimizer(exact)
    for step in range(12):
        train(model, optimizer, [step])
        train(exact, reference, [step])
        assert_replicas_are_equal(model)
    assert not torch.equal(model[0].weight, exact[0].weight)
    torch.testing.assert_close(model[0].weight, exact[0].weight, rtol=0, atol=12 * 1e-2 * 2**-6)


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


def overlapped_updates_are_those_of_one_all_gather(folder):
    """Buckets of one block, and of a few; parameters without gradients; a group added later."""
    for dtype, settings in (
        (torch.float32, {"grafting": GraftingConfig(method="lamb"), "nesterov": True}),
        (torch.bfloat16, {"grafting": GraftingConfig(method="sgd", blend_steps=4), "staleness": EAGER}),
    ):
        models, optimizers = [], []
        for size in (None, 1, 600):
            models.append(make_model())
            weights = list(models[-1][:3].parameters())
            config = DistributedConfig(
                communication_dtype=dtype, overlap=size is not None, bucket_bytes=size or 1
            )
            optimizers.append(
                Shampoo(
                    [{"params": weights[:2]}, {"params": weights[2:], "lr": 0.1}],
                    momentum=0.9,
                    blocking=BlockingConfig(block_size=8),
                    service=LocalExchange(1),
                    distributed=config,
                    **({"staleness": SCHEDULED} | settings),
                )
            )
        for step in range(10):
            for model, optimizer in zip(models, optimizers, strict=True):
                if step == 5:
                    optimizer.add_param_group({"params": list(model[4].parameters())})
                # In step 7 the first group has no gradient at all.
                train(model, optimizer, [step], {0, 1} if step == 7 else {2} if step % 3 == 1 else ())
            assert_replicas_are_equal(models[0])
            for model in models[1:]:
                assert_same(model, models[0])
        assert optimizers[0].metrics()["versions_adopted"] > 0
        assert [len(o._engine._shared._buckets) for o in optimizers[:1]] == [1]
        assert len(optimizers[1]._engine._shared._buckets) >= 12 // dist.get_world_size()


def an_all_gather_is_under_way_while_the_next_blocks_are_preconditioned(folder):
    """All but the last bucket of every group have left before its last stack is done."""
    events = []
    model = make_model()
    optimizer = make_optimizer(
        model, staleness=EAGER, distributed=DistributedConfig(overlap=True, bucket_bytes=1)
    )
    train(model, optimizer, range(8))
    shared = optimizer._engine._shared
    launch, stacks = shared._launch, [e.stack for plan in optimizer._engine.plans for e in plan.stacks]
    shared._launch = lambda bucket: (launch(bucket), events.append(("sent", bool(bucket.works))))
    for stack in stacks:
        whole = stack.precondition
        stack.precondition = lambda *args, whole=whole: (events.append(("product",)), whole(*args))[1]
    train(model, optimizer, [8])
    assert ("sent", False) not in events
    first, last = events.index(("sent", True)), len(events) - 1 - events[::-1].index(("product",))
    assert first < last, events


def a_long_block_is_broadcast_and_takes_its_own_length(folder):
    """As a vocabulary's: one block that is longer than two of four equal shares, and not one of two."""
    ranks = dist.get_world_size()
    blocking = BlockingConfig(block_size=8, max_side=64)
    for distributed in (DistributedConfig(), DistributedConfig(overlap=True, bucket_bytes=300)):
        models = []
        for where in (distributed, "off"):
            torch.manual_seed(0)
            models.append(nn.Sequential(nn.Linear(12, 600), nn.Linear(8, 8)))
            optimizer = make_optimizer(models[-1], blocking=blocking, distributed=where)
            for step in range(12):
                # The long blocks' parameter has no gradient in some steps.
                train(models[-1], optimizer, [step], {0} if step % 4 == 1 else ())
            if where != "off":
                shared, estimate = optimizer._engine._shared, optimizer.estimate_memory()
                assert optimizer.estimate_memory(replicas=ranks, replica=dist.get_rank()) == estimate
        assert_same(*models)
        assert_replicas_are_equal(models[0])
        long = [alone for bucket in shared._buckets for _, alone in bucket.broadcasts]
        buffers = [t for bucket in shared._buckets for t in (bucket.sent, bucket.received)]
        assert sum(t.numel() for t in [*long, *buffers]) == estimate.gather_buffers
        if not distributed.overlap:
            assert [t.numel() for t in long] == ([4 * 600 * 8] if ranks == 4 else [])
        assert bool(long) is (ranks == 4)


def memory_of_owners_and_others_is_as_the_formula_has_it(folder):
    """The first parameter's blocks are so costly that the others are left with the second's."""
    for config in (DistributedConfig(), DistributedConfig(communication_dtype=torch.bfloat16, overlap=True)):
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.randn(shape)) for shape in ((256, 512), (96, 96), (512,))]
        optimizer = Shampoo(
            parameters,
            blocking=BlockingConfig(block_size=512),
            staleness=StalenessConfig(refresh_every=2, stagger=False),
            service=Waiting(),
            distributed=config,
        )
        estimate = optimizer.estimate_memory()
        as_if = optimizer.estimate_memory(replicas=dist.get_world_size(), replica=dist.get_rank())
        assert as_if == estimate
        expected = estimate.total - estimate.in_flight
        measured = peak_of_steps(optimizer, adopts=dist.get_rank() < 2)
        assert measured <= expected <= 1.3 * measured, (measured, estimate)
        statistics = on_all_ranks(estimate.statistics)
        assert max(statistics) > 10 * min(statistics)


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


def a_gradient_that_is_not_finite_is_refused_by_all(folder):
    model = make_model()
    optimizer = make_optimizer(model)
    train(model, optimizer, range(3))
    before = weights(model)
    set_gradients(model, 3)
    model[2].weight.grad[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"gradient of 2\.weight holds 1 NaN"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
    train(model, optimizer, range(3, 6))
    assert_replicas_are_equal(model)


def different_models_are_refused_by_name_on_all_ranks(folder):
    torch.manual_seed(0)
    size = 8 if dist.get_rank() else 9
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, size))
    optimizer = make_optimizer(model)
    with pytest.raises(ValueError, match=r"1\.weight is not the same parameter on all ranks: rank 0: .*9, 6"):
        train(model, optimizer, range(1))


def different_numbers_of_parameters_are_refused(folder):
    model = nn.Sequential(*(nn.Linear(4, 6, bias=False) for _ in range(2 + dist.get_rank())))
    with pytest.raises(
        ValueError, match=r"do not train the same: rank 0: at step 0, 2 parameters.*rank 1: .* 3"
    ):
        train(model, make_optimizer(model), range(1))


def different_settings_are_refused_by_name(folder):
    model = make_model()
    optimizer = make_optimizer(model, blocking=BlockingConfig(block_size=8 + dist.get_rank()))
    with pytest.raises(ValueError, match=r"0\.weight is not the same parameter on all ranks"):
        train(model, optimizer, range(1))
    optimizer = make_optimizer(model, grafting=GraftingConfig(method="sgd" if dist.get_rank() else "adam"))
    with pytest.raises(ValueError, match=r"0\.weight is not the same parameter.*ADAM.*SGD"):
        train(model, optimizer, range(1))
    optimizer = make_optimizer(model, lr=1e-3 * (1 + dist.get_rank()))
    with pytest.raises(ValueError, match=r"0\.weight is not the same parameter.*lr=0\.001 .*lr=0\.002 "):
        train(model, optimizer, range(1))
    plain = torch.optim.SGD(model.parameters(), lr=1e-3)
    method = "sgd" if dist.get_rank() else "adam"
    attach(plain, model, grafting=GraftingConfig(method=method), service=LocalExchange())
    with pytest.raises(ValueError, match=r"0\.weight is not the same parameter.*ADAM.*SGD"):
        train(model, plain, range(1))
    optimizer = make_optimizer(model, staleness=StalenessConfig(max_staleness=20 + dist.get_rank()))
    with pytest.raises(ValueError, match="the ranks do not train the same"):
        train(model, optimizer, range(1))
    config = DistributedConfig(overlap=dist.get_rank() == 0)
    with pytest.raises(ValueError, match=r"the ranks do not train the same.*bucket_bytes=None"):
        train(model, make_optimizer(model, distributed=config), range(1))


def different_settings_of_an_attached_optimizer_are_refused_by_name(folder):
    rank = dist.get_rank()
    for make, message in (
        (lambda p: torch.optim.SGD(p, lr=0.1 * (1 + rank)), r"lr=0\.1 .*lr=0\.2 "),
        (lambda p: torch.optim.SGD(p, lr=torch.tensor(0.5 * (1 + rank))), r"lr=0\.5 .*lr=1\.0 "),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5 + rank / 4), r"momentum=0\.5 .*momentum=0\.75 "),
        (
            lambda p: torch.optim.AdamW(p, betas=(0.5, 0.75 + rank / 8)),
            r"0\.5, 0\.75\).*0\.5, 0\.875\)",
        ),
        (lambda p: torch.optim.AdamW(p, weight_decay=0.5 * rank), r"weight_decay=0\.0 .*weight_decay=0\.5 "),
        (lambda p: (torch.optim.SGD, torch.optim.AdamW)[rank](p, lr=0.1), "SGD .*AdamW "),
    ):
        model = make_model()
        optimizer = make(model.parameters())
        handle = attach(optimizer, model, service=LocalExchange())
        before = weights(model)
        with pytest.raises(ValueError, match=r"0\.weight is not the same parameter on all ranks.*" + message):
            train(model, optimizer, range(1))
        assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
        handle.close()
    own = GroupConfig(grafting=GraftingConfig(method="lars"))
    for groups, message in (
        ((None, {1: None}), r"2\.weight is not the same .*rank 0: .*GroupSettings.*rank 1: .* left alone "),
        ((dict.fromkeys(range(2)), {0: None}), r"2\.weight is not the same .* left alone .*GroupSettings"),
        ((dict.fromkeys(range(2)), {}), r"0\.weight is not the same .* left alone .*GroupSettings"),
        (({0: own}, {1: own}), r"0\.weight is not the same .*LARS.*ADAM"),
        (({}, {2: None}), None),  # of a group that nobody has
    ):
        model = make_model()
        optimizer, handle = make_attached(model, cuts=(2,), groups=groups[rank])
        with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
            train(model, optimizer, range(1))
        assert handle.metrics()["step"] == (0 if message else 1)
        handle.close()


def different_settings_of_parameters_without_blocks_are_refused_by_name(folder):
    """There is no session then. In a model with blocks, a group that comes later changes none."""
    model = make_model()
    vectors = [p for p in model.parameters() if p.ndim == 1]
    for parameter in vectors:
        parameter.grad = torch.ones_like(parameter)
    optimizer = Shampoo(vectors, lr=0.1 * (1 + dist.get_rank()), service=LocalExchange())
    with pytest.raises(ValueError, match=r"group0\.parameter0 is not the same.*lr=0\.1 .*lr=0\.2 "):
        optimizer.step()
    with torch.no_grad():
        vectors[0] += dist.get_rank()
    optimizer = Shampoo(vectors, service=LocalExchange())
    with pytest.raises(ValueError, match=r"group0\.parameter0 does not have the same weights"):
        optimizer.step()
    for different in (False, True):
        model, exchange = make_model(), ScriptedExchange()
        optimizer = Shampoo([model[0].weight], service=exchange)
        train(model, optimizer, range(2))
        session = exchange.session
        optimizer.add_param_group({"params": [model[0].bias], "lr": 0.1 * (1 + different * dist.get_rank())})
        if different:
            with pytest.raises(ValueError, match=r"group1\.parameter0 is not the same.*lr=0\.1 .*lr=0\.2 "):
                train(model, optimizer, range(2, 4))
        else:
            train(model, optimizer, range(2, 4))
        assert exchange.session is session


def models_of_their_own_are_refused_unless_distributed_is_off(folder):
    model = make_model()
    with torch.no_grad():
        model[2].weight[0, 0] += dist.get_rank()
    with pytest.raises(ValueError, match=r"2\.weight does not have the same weights.*distributed=\"off\""):
        train(model, make_optimizer(model), range(1))
    optimizer = make_optimizer(model, distributed="off")
    # No collective: ranks may even take different numbers of steps.
    train(model, optimizer, range(3 + dist.get_rank()))
    assert optimizer.metrics()["step"] == 3 + dist.get_rank()


def gradients_of_different_parameters_are_refused_by_name_on_all_ranks(folder):
    model = make_model()
    optimizer = make_optimizer(model)
    train(model, optimizer, range(3))
    with pytest.raises(RuntimeError, match=r"4\.weight has a gradient on the replicas \[1.*\] of"):
        train(model, optimizer, [3], without={4} if dist.get_rank() == 0 else ())
    # In buckets, too, where the first rank has no gradient in a whole group.
    model = make_model()
    groups = [{"params": list(layer.parameters())} for layer in model]
    optimizer = Shampoo(
        [group for group in groups if group["params"]],
        blocking=BlockingConfig(block_size=8),
        service=LocalExchange(1),
        distributed=DistributedConfig(overlap=True, bucket_bytes=300),
    )
    train(model, optimizer, range(3))
    with pytest.raises(RuntimeError, match=r"group1\.parameter0 has a gradient on the replicas \[1.*\] of"):
        train(model, optimizer, [3], without={2, 3} if dist.get_rank() == 0 else ())


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
    bfloat16_communication_rounds_on_all_ranks_alike,
    every_block_has_one_owner_and_the_work_is_balanced,
    overlapped_updates_are_those_of_one_all_gather,
    an_all_gather_is_under_way_while_the_next_blocks_are_preconditioned,
    a_long_block_is_broadcast_and_takes_its_own_length,
    memory_of_owners_and_others_is_as_the_formula_has_it,
    replicas_stay_bit_identical_whatever_arrives_when,
    attached_replicas_stay_bit_identical_whatever_arrives_when,
    an_exchange_that_never_answers_at_one_rank,
    under_distributed_data_parallel,
    an_attached_preconditioner_shares_its_blocks,
    a_group_left_alone_is_shared_with_nobody,
    a_gradient_that_is_not_finite_is_refused_by_all,
    different_models_are_refused_by_name_on_all_ranks,
    different_numbers_of_parameters_are_refused,
    different_settings_are_refused_by_name,
    different_settings_of_an_attached_optimizer_are_refused_by_name,
    different_settings_of_parameters_without_blocks_are_refused_by_name,
    models_of_their_own_are_refused_unless_distributed_is_off,
    gradients_of_different_parameters_are_refused_by_name_on_all_ranks,
    a_process_group_of_some_ranks,
    no_warning,
    *ON_ACCELERATORS,
]

ON_FOUR_RANKS = [
    several_ranks_give_the_bits_of_one,
    every_block_has_one_owner_and_the_work_is_balanced,
    overlapped_updates_are_those_of_one_all_gather,
    a_long_block_is_broadcast_and_takes_its_own_length,
    memory_of_owners_and_others_is_as_the_formula_has_it,
    replicas_stay_bit_identical_whatever_arrives_when,
    attached_replicas_stay_bit_identical_whatever_arrives_when,
    an_exchange_that_never_answers_at_one_rank,
    under_distributed_data_parallel,
    gradients_of_different_parameters_are_refused_by_name_on_all_ranks,
    a_process_group_of_some_ranks,
]
"""Those in which it matters how many there are."""
