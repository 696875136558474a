from __future__ import annotations

import pytest
import torch

from preconditioner_client import BlockingConfig, StatisticsConfig
from preconditioner_client.blocks import partition
from preconditioner_client.stack import BlockStack, Member
from preconditioner_protos import unpack

SHAPE, COUNT = (4, 3, 2), 3


def make(accumulation="sum", count=COUNT):
    cut = partition(SHAPE, BlockingConfig(merge_dims=False))
    members = [Member(i, 0, cut.merged, cut.blocks[0]) for i in range(count)]
    config = StatisticsConfig(accumulation=accumulation, beta=0.9)
    return BlockStack(members, cut.preconditioned, config, torch.device("cpu"))


def tensors(seed=0, count=COUNT):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator) for _ in range(count)]


def test_statistics_contract_all_other_sides():
    stack, given = make(), tensors()
    stack.accumulate(stack.gather(given, (0, 1, 2)), (0, 1, 2))
    for row, g in enumerate(given):
        torch.testing.assert_close(stack.statistics[0][row], torch.einsum("abc,dbc->ad", g, g))
        torch.testing.assert_close(stack.statistics[1][row], torch.einsum("abc,adc->bd", g, g))
        torch.testing.assert_close(stack.statistics[2][row], torch.einsum("abc,abd->cd", g, g))


@pytest.mark.parametrize("rows", [(0, 1, 2), (0, 2), (1,)])
def test_preconditioning_multiplies_every_side(rows):
    stack, given = make(), tensors()
    generator = torch.Generator().manual_seed(1)
    factors = []
    for _ in range(COUNT):
        sides = [torch.randn(n, n, generator=generator) for n in SHAPE]
        sides = [s + s.T for s in sides]
        factors.append(sides)
    stack.adopt(range(COUNT), factors)
    result = stack.precondition(stack.gather(given, rows), rows)
    for position, row in enumerate(rows):
        expected = torch.einsum("abc,ax,by,cz->xyz", given[row], *factors[row])
        torch.testing.assert_close(result[position], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("accumulation", ["sum", "ema"])
def test_a_block_without_a_gradient_keeps_its_statistics(accumulation):
    stack, given = make(accumulation), tensors()
    stack.accumulate(stack.gather(given, (0, 1, 2)), (0, 1, 2))
    before = [s.clone() for s in stack.statistics]
    partial = [given[0], None, given[2]]
    stack.accumulate(stack.gather(partial, (0, 2)), (0, 2))
    for now, then in zip(stack.statistics, before, strict=True):
        torch.testing.assert_close(now[1], then[1], rtol=0, atol=0)
        assert not torch.equal(now[0], then[0])
    assert stack.updates == [2, 1, 2]


def test_a_snapshot_is_the_bias_corrected_upper_triangle_and_a_copy():
    stack, given = make("ema"), tensors()
    stack.accumulate(stack.gather(given, (0, 1, 2)), (0, 1, 2))
    (packed,) = stack.snapshot([1]).sides
    g = given[1]
    full = torch.from_numpy(unpack(packed[0].numpy(), SHAPE[0]))
    torch.testing.assert_close(full, torch.einsum("abc,dbc->ad", g, g))
    kept = packed[0].clone()
    stack.accumulate(stack.gather(given, (0, 1, 2)), (0, 1, 2))
    assert torch.equal(packed[0], kept)


def test_scatter_is_the_inverse_of_gather_and_refuses_a_layout_that_would_swallow_it():
    stack, given = make(), tensors()
    blocks = stack.gather(given, (0, 1, 2))
    target = [torch.zeros(SHAPE) for _ in range(COUNT)]
    stack.scatter(blocks, target, (0, 1, 2))
    for t, g in zip(target, given, strict=True):
        assert torch.equal(t, g)
    with pytest.raises(ValueError, match="contiguous"):
        stack.scatter(blocks, [t.transpose(0, 1) for t in target], (0, 1, 2))
