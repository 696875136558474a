"""The accelerators that tests run on: a pretended one, and where there is one a real one, too."""

from __future__ import annotations

import contextlib

import pytest
import torch

from pretend_cuda import pretended_cuda

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
ACCELERATORS = ["pretended", pytest.param("real", marks=NEEDS_CUDA)]


class RealAccelerator:
    """CUDA's first device.

    Attributes:
        device: that tensors go to.
        warm_up: steps in which memory is allocated and kernels are loaded.
        is_exact: whether its numbers are those of the CPU, bit for bit.
    """

    device = torch.device("cuda", 0)
    warm_up = 3
    is_exact = False

    @contextlib.contextmanager
    def no_waiting(self):
        """Whatever would make the host wait for the accelerator raises."""
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def synchronize(self):
        torch.cuda.synchronize()


@contextlib.contextmanager
def accelerator_named(name):
    """One of ``ACCELERATORS``."""
    if name == "real":
        # What is compared with the CPU is not rounded to the 10 bits of TF32, as convolutions are by default.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield RealAccelerator()
        return
    with pretended_cuda() as pretended:
        yield pretended
