"""Scenarios of how replicas share finished updates: collectives, their dtype, overlap and memory."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from distributed_training import (
    EAGER,
    SCHEDULED,
    assert_replicas_are_equal,
    assert_same,
    make_model,
    make_optimizer,
    on_all_ranks,
    train,
)
from live_tensors import Waiting, peak_of_steps
from preconditioner_client import (
    BlockingConfig,
    DistributedConfig,
    GraftingConfig,
    LocalExchange,
    Shampoo,
    StalenessConfig,
)


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


SCENARIOS = [
    bfloat16_communication_rounds_on_all_ranks_alike,
    overlapped_updates_are_those_of_one_all_gather,
    an_all_gather_is_under_way_while_the_next_blocks_are_preconditioned,
    a_long_block_is_broadcast_and_takes_its_own_length,
    memory_of_owners_and_others_is_as_the_formula_has_it,
]

ON_FOUR_RANKS = [
    overlapped_updates_are_those_of_one_all_gather,
    a_long_block_is_broadcast_and_takes_its_own_length,
    memory_of_owners_and_others_is_as_the_formula_has_it,
]
