"""An accelerator that is not there: tensors with real values that say they are on ``cuda:k``.

Every operator is computed on the CPU, on the tensor that a :class:`pretend_tensors.PretendTensor` wraps. Code
that asks for ``tensor.device`` takes its CUDA paths, streams and events of ``torch.cuda`` included, and gets
an error for

* operators on tensors of two devices, but for the numbers (0-D) of the host that CUDA takes, too;
* whatever would make the host wait, within :meth:`Accelerator.no_waiting`: values asked for (``item``,
  ``bool``, ``nonzero``, masks as indices), copies that block or are of ordinary memory, ``synchronize``;
* work on a stream that may come before what it reads, or overwrite what another stream still reads;
* memory that is freed while another stream than its own may use it (``record_stream``);
* page-locked memory that changes while it is copied from. What is copied to the host is NaN, or -1, until an
  event has said that it is there;
* a collective on a tensor of the host, which NCCL has no means for.

:attr:`pretend_streams.Runtime.contexts` tells on which devices a real process would have taken memory.

It does not show that CUDA's kernels take the dtypes, shapes and lists that they are given, or what they round
to, nor times, nor anything of CUDA graphs, of NCCL's own streams, of autograd's threads or of the memory that
allocators keep. An operator that waits inside of its CUDA kernel is known only if its tags say so, as those
of ``linalg`` do not. Devices are named with their number, ``cuda:0``; ``cuda`` alone asks for the real CUDA.
"""

from __future__ import annotations

import contextlib
import sys
from functools import partial
from unittest.mock import patch

import torch
from torch.utils._device import _device_constructors

from preconditioner_client import stack, transfer
from pretend_streams import Event, Runtime, Stream
from pretend_tensors import Operators, pinned_like


class Accelerator:
    """The pretended accelerator, in the hands of a test; see :class:`accelerators.RealAccelerator`."""

    warm_up = 0
    is_exact = True

    def __init__(self, runtime):
        self.runtime = runtime
        self.device = torch.device("cuda", 0)

    @contextlib.contextmanager
    def no_waiting(self):
        """Whatever would make the host wait for the accelerator raises."""
        self.runtime.may_wait = False
        try:
            yield
        finally:
            self.runtime.may_wait = True

    def synchronize(self):
        for stream in self.runtime.streams:
            self.runtime.observe(stream.clock)


@contextlib.contextmanager
def pretended_cuda(lag=2):
    """The accelerator in the place of CUDA, for the thread that enters; streams and events for all.

    Args:
        lag: see :class:`pretend_streams.Runtime`.
    """
    runtime = Runtime(lag)
    original_empty = torch.empty
    _device_constructors()  # remembers its answer, which is to have the function of before

    def empty(*args, pin_memory=False, **kwargs):
        if not pin_memory:
            return original_empty(*args, **kwargs)
        made = original_empty(*args, **kwargs)
        if made.device.type != "cpu":
            raise RuntimeError("only tensors of the host can be in page-locked memory")
        return pinned_like(runtime, made)

    class _Device:
        def __init__(self, device):
            self._index = runtime.index_of(device)

        def __enter__(self):
            self._before, runtime.device = runtime.device, self._index

        def __exit__(self, *_):
            runtime.device = self._before

    @contextlib.contextmanager
    def on_stream(stream):
        before = runtime.select(stream)
        try:
            yield
        finally:
            runtime.restore(stream, before)

    stands_in = {
        "Stream": partial(Stream, runtime),
        "Event": partial(Event, runtime=runtime),
        "current_stream": runtime.current,
        "stream": on_stream,
        "device": _Device,
        "set_device": lambda device: setattr(runtime, "device", runtime.index_of(device)),
        "current_device": lambda: runtime.device,
        "is_current_stream_capturing": lambda: False,
    }
    if not torch.cuda.is_available():
        stands_in["_lazy_init"] = lambda: None
    lifts = torch._C._only_lift_cpu_tensors()
    with contextlib.ExitStack() as patches:
        for name, value in stands_in.items():
            patches.enter_context(patch.object(torch.cuda, name, value))
        patches.enter_context(patch.object(torch, "empty", empty))
        patches.enter_context(patch.object(transfer, "_streams", {}))
        if "torch.distributed.tensor" in sys.modules:
            sharded = sys.modules["torch.distributed.tensor"].DTensor
            device = property(lambda tensor: tensor._local_tensor.device)
            patches.enter_context(patch.object(sharded, "device", device, create=True))
        stack.upper_of.cache_clear()
        # So that torch.tensor(.., device=..) makes its tensor first, and moves it where we see it.
        torch._C._set_only_lift_cpu_tensors(True)
        try:
            with Operators(runtime):
                yield Accelerator(runtime)
        finally:
            torch._C._set_only_lift_cpu_tensors(lifts)
            stack.upper_of.cache_clear()
    assert not runtime.faults, runtime.faults
