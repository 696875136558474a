"""Memory for intermediate matrices, kept between calls where that pays.

A fresh array of more than some 100 KiB is fresh pages from the kernel, whose first touch costs as much as
several passes over the data. Per thread one array per purpose is kept, up to a size at which the work on it
dwarfs that cost.
"""

from __future__ import annotations

import threading

import numpy as np

from .conditioning import Floats

_KEPT_ELEMENTS = 1 << 19
_local = threading.local()


def scratch(purpose: str, count: int, n: int) -> Floats:
    """Return an uninitialised (count, n, n) array, valid until this thread asks for this purpose again."""
    size = count * n * n
    if size > _KEPT_ELEMENTS:
        return np.empty((count, n, n))
    kept: dict[str, Floats] = _local.__dict__
    flat = kept.get(purpose)
    if flat is None or len(flat) < size:
        flat = kept[purpose] = np.empty(size)
    return flat[:size].reshape(count, n, n)
