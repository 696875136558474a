"""Who holds which block: decided by shapes alone, in one process."""

from __future__ import annotations

import pytest
import torch

from preconditioner_client import (
    BlockingConfig,
    DistributedConfig,
    LocalExchange,
    RootConfig,
    Shampoo,
    StatisticsConfig,
)
from preconditioner_client.blocks import partition
from preconditioner_client.distribution import Ranks
from preconditioner_client.plan import GroupSettings, Loads, plan_group
from preconditioner_client.sharing import bucketed

SETTINGS = GroupSettings(
    blocking=BlockingConfig(block_size=8), statistics=StatisticsConfig(), root=RootConfig()
)
SHAPES = [(20, 12), (16, 16), (7,), (40, 3), (8, 4, 3, 3), (0, 4), ()]


def plans(replicas):
    parameters = [torch.empty(shape) for shape in SHAPES]
    names = [f"p{i}" for i in range(len(SHAPES))]
    return [
        plan_group(SETTINGS, parameters, names, ranks=Ranks(replica=replica, replicas=replicas))
        for replica in range(replicas)
    ]


@pytest.mark.parametrize("replicas", [1, 2, 3, 5, 50])
def test_every_block_has_one_owner(replicas):
    found = plans(replicas)
    everything = [(b.member.parameter, b.key) for b in found[0].blocks]
    assert len(everything) == len(set(everything))
    own = [(i, held.key) for plan in found for i, rows in enumerate(plan.rows) for held in rows]
    assert sorted(own) == sorted(everything)
    for plan in found:
        assert plan.blocks == found[0].blocks, "ranks disagree"
        assert len(plan.own) == len(plan.specs) == sum(len(e.stack) for e in plan.stacks)
        assert [plan.blocks[position].sides for position in plan.own] == [spec.sides for spec in plan.specs]


@pytest.mark.parametrize("size", [None, 1, 300, 2**40])
def test_buckets_hold_every_block_once_and_no_more_than_asked_for(size):
    ranks = Ranks(replicas=3, bucket_bytes=size)
    of_groups = [plans(3)[0], plans(3)[0]]
    buckets = bucketed(of_groups, ranks)
    found = [(group, b.member.parameter, b.key) for content in buckets for group, b in content]
    assert sorted(found) == sorted(
        (g, b.member.parameter, b.key) for g in (0, 1) for b in of_groups[g].blocks
    )
    if size is None:
        assert len(buckets) == 1
        return
    for content in buckets:
        assert len({group for group, _ in content}) == 1
        for replica in range(3):
            own = [4 * b.member.place.numel for _, b in content if b.replica == replica]
            assert sum(own[:-1]) < size


def test_the_costliest_blocks_are_spread_first():
    loads = Loads()
    assert loads.assign(0, 2, [1.0, 5.0, 1.0, 4.0, 1.0]) == [1, 0, 0, 1, 1]
    # A later group is given to whom the earlier ones left the least.
    assert loads.assign(0, 2, [1.0, 1.0]) == [0, 1]
    assert loads.assign(1, 2, [1.0, 1.0]) == [0, 1]


@pytest.mark.parametrize("shape", [(20, 12), (8, 4, 3, 3), (3, 2, 50), (1, 9, 9), (5, 1, 7)])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_blocks_of_shards_cover_the_parameter_once(shape, size):
    whole = torch.arange(torch.tensor(shape).prod()).view(shape)
    seen = []
    for start in range(0, shape[0], size):
        stop = min(start + size, shape[0])
        cut = partition(shape, SETTINGS.blocking, (start, stop))
        for place in cut.blocks:
            block = whole[start:stop].reshape(cut.merged)[place.slices]
            # The key says where the block lies in the whole parameter.
            merged = whole.reshape(-1, *cut.merged[1:])
            slices = tuple(slice(*map(int, part.split(":"))) for part in place.key(cut.origin).split(","))
            assert torch.equal(block, merged[slices])
            seen.append(block.reshape(-1))
    assert torch.equal(torch.cat(seen).sort().values, whole.reshape(-1))


def test_rows_are_divided_as_torch_does():
    ranks = Ranks(shards=4, mesh=object())
    assert [ranks.rows(10, shard) for shard in range(4)] == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert [ranks.rows(2, shard) for shard in range(4)] == [(0, 1), (1, 2), (2, 2), (2, 2)]
    assert Ranks().rows(10, 0) is None


@pytest.mark.parametrize("value", [None, "ddp", True])
def test_what_is_no_way_of_distributing(value):
    with pytest.raises(ValueError, match='"auto", "off" or a DistributedConfig'):
        Shampoo([torch.nn.Parameter(torch.ones(2, 2))], service=LocalExchange(), distributed=value)


def test_settings_that_do_not_fit():
    with pytest.raises(ValueError, match=r"torch\.float32 or torch\.bfloat16, not torch\.float16"):
        DistributedConfig(communication_dtype=torch.float16)
    with pytest.raises(ValueError, match="bucket_bytes must be >= 1, not 0"):
        DistributedConfig(overlap=True, bucket_bytes=0)
    p = torch.nn.Parameter(torch.ones(2, 2))
    p.grad = torch.ones(2, 2)
    optimizer = Shampoo([p], service=LocalExchange(), distributed=DistributedConfig())
    with pytest.raises(ValueError, match=r"needs torch\.distributed\.init_process_group"):
        optimizer.step()
