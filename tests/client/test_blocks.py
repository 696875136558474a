from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preconditioner_client import BlockingConfig
from preconditioner_client.blocks import merge_dims, partition

shapes = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple)


@pytest.mark.parametrize(
    ("shape", "limit", "merged"),
    [
        ((64, 32, 3, 3), 512, (64, 288)),
        ((64, 32, 3, 3), 100, (64, 32, 9)),
        ((64, 128), 10**6, (64, 128)),
        ((16, 1, 3, 3), 64, (16, 9)),
        ((1, 7), 64, (7,)),
        ((1, 1), 64, (1,)),
        ((2, 3, 4, 5), 10**6, (2, 60)),
    ],
)
def test_merging(shape, limit, merged):
    assert merge_dims(shape, limit) == merged


@given(shapes, st.integers(1, 40))
def test_merging_keeps_the_elements_and_never_makes_a_vector_of_a_matrix(shape, limit):
    merged = merge_dims(shape, limit)
    assert math.prod(merged) == math.prod(shape)
    assert (len(merged) >= 2) == (sum(n > 1 for n in shape) >= 2)


@given(shapes, st.integers(1, 6), st.booleans(), st.one_of(st.none(), st.integers(1, 12)))
def test_blocks_cover_every_element_once(shape, block_size, merge, max_side):
    config = BlockingConfig(block_size=block_size, merge_dims=merge, max_side=max_side)
    cut = partition(shape, config)
    covered = np.zeros(cut.merged)
    for block in cut.blocks:
        covered[block.slices] += 1
        for dim in cut.preconditioned:
            assert block.shape[dim] <= block_size
        for dim in set(range(len(cut.merged))) - set(cut.preconditioned):
            assert block.shape[dim] == cut.merged[dim]
    assert not cut.blocks or (covered == 1).all()


def test_a_wide_side_is_neither_cut_nor_preconditioned():
    cut = partition((50_000, 768), BlockingConfig(block_size=512, max_side=8192))
    assert cut.preconditioned == (1,)
    assert [b.shape for b in cut.blocks] == [(50_000, 512), (50_000, 256)]


@pytest.mark.parametrize("shape", [(), (10,), (1, 10), (0, 4), (9000, 9000)])
def test_what_falls_to_the_diagonal_method(shape):
    assert partition(shape, BlockingConfig()).blocks == ()
