from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from preconditioner_protos import pack, packed_length, packing, unpack

sides = st.integers(1, 20)
dtypes = st.sampled_from([np.float32, np.float64])


@given(st.data(), sides, dtypes, st.sampled_from([(), (3,), (2, 2)]))
def test_packing_is_lossless_to_the_bit(data, n, dtype, batch):
    full = data.draw(
        hnp.arrays(dtype, (*batch, n, n), elements=st.floats(width=np.dtype(dtype).itemsize * 8))
    )
    packed = pack(full)
    assert packed.shape == (*batch, n * (n + 1) // 2)
    assert packed.dtype == dtype
    assert packed.flags.c_contiguous
    again = unpack(packed, n)
    rows, columns = np.triu_indices(n)
    # Bits, not values: signed zeros and NaN payloads survive too.
    assert again[..., rows, columns].tobytes() == full[..., rows, columns].tobytes()
    assert again.tobytes() == np.ascontiguousarray(np.swapaxes(again, -1, -2)).tobytes()


@pytest.mark.parametrize("batch", [(), (2,)])
def test_large_sides_go_row_by_row_with_the_same_result(monkeypatch, batch):
    full = np.random.default_rng(0).standard_normal((*batch, 9, 9))
    packed = pack(full)
    expected = unpack(packed, 9)
    monkeypatch.setattr(packing, "_INDEXED_UP_TO", 4)
    assert pack(full).tobytes() == packed.tobytes()
    assert unpack(packed, 9).tobytes() == expected.tobytes()


def test_the_order_is_row_by_row():
    matrix = np.array([[1.0, 2, 3], [2, 4, 5], [3, 5, 6]])
    assert pack(matrix).tolist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("shape", [(3,), (2, 3), (4, 3, 2)])
def test_only_square_matrices_are_packed(shape):
    with pytest.raises(ValueError, match="square"):
        pack(np.zeros(shape))


def test_the_length_must_fit():
    with pytest.raises(ValueError, match=r"3 x 3 matrix has 6 values"):
        unpack(np.zeros(5), 3)
    assert packed_length(46341) == 46341 * 46342 // 2
