"""Tensors of an accelerator that is not there, and its operators, see :mod:`pretend_cuda`."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from pretend_streams import Memory

aten = torch.ops.aten
_COPIES = (aten.copy_.default, aten._foreach_copy_.default)
_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class PretendTensor(torch.Tensor):
    """A tensor of the accelerator.

    To torch's own code it is on the meta device, whose index says which one it is: so it needs no CUDA.

    Args:
        inner: on the CPU; views share its memory.
        index: of the device.
        memory: shared with all its views.
    """

    @staticmethod
    def __new__(cls, inner, index, memory):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device("meta", index),
        )

    def __init__(self, inner, index, memory):
        self.inner = inner
        self.memory = memory
        self._device = torch.device("cuda", index)

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} outside of the pretended accelerator")

    device = property(lambda self: self._device)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)

    def __repr__(self):
        return f"PretendTensor({self.inner}, device={self._device})"

    def to(self, *args, **kwargs):
        rest = tuple(arg for arg in args if arg != self._device)
        if kwargs.get("device") == self._device:
            kwargs = {key: value for key, value in kwargs.items() if key != "device"}
        return super().to(*rest, **kwargs) if rest or kwargs else self

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, *, force=False):
        raise TypeError(f"can't convert {self._device} device type tensor to numpy")

    def record_stream(self, stream):
        self.memory.recorded.add(stream)


class Operators(TorchDispatchMode):
    """Computes every operator, and keeps account of it."""

    def __init__(self, runtime):
        super().__init__()
        self._runtime = runtime

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
            return func(*args, **kwargs)  # a DTensor looks at shapes
        if not {PretendTensor, torch.Tensor, torch.nn.Parameter}.issuperset(types):
            return NotImplemented  # a DTensor, which comes back with what it holds
        if func is aten.is_pinned.default:
            return self._is_pinned(args[0])
        if func is aten._pin_memory.default:
            return pinned_like(self._runtime, args[0]).copy_(args[0])
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        ours = [tensor for tensor in tensors if isinstance(tensor, PretendTensor)]
        if func.namespace == "c10d" and len(ours) < len(tensors):
            raise RuntimeError(f"{func}: no backend for the device type cpu")
        target = _wanted(self._runtime, kwargs)
        if func in _COPIES:
            return self._copied(func, *args, **kwargs)
        if func is aten._to_copy.default and target is not None and _index(args[0]) != target:
            return self._moved(args[0], target, kwargs)
        if not ours and target in (None, -1):
            return func(*args, **kwargs)
        if ours and target not in (None, ours[0].device.index):
            raise RuntimeError(f"{func} of a tensor on {ours[0].device} makes one on another device")
        if "_foreach_" in func.__name__ and len({tensor.device for tensor in args[0]}) > 1:
            return self._one_by_one(func, args, kwargs)
        self._check(func, args, tensors, ours)
        return self._computed(func, ours[0].device.index if ours else target, args, kwargs)

    def _one_by_one(self, func, args, kwargs):
        """As CUDA does it with lists of several devices: what stands at one position has to be on one."""
        length = len(args[0])
        assert all(
            isinstance(arg, torch.Tensor) or len(arg) == length for arg in args if hasattr(arg, "__len__")
        )
        with self:
            found = [
                func(*([arg[i]] if isinstance(arg, (list, tuple)) else arg for arg in args), **kwargs)
                for i in range(length)
            ]
        return [of_one[0] for of_one in found] if func._schema.returns else None

    def _computed(self, func, index, args, kwargs):
        """An operator on tensors of one device, or that makes one there."""
        known = {}
        memories = {}

        def opened(tensor):
            known[id(tensor.inner)] = tensor
            memories[tensor.inner.untyped_storage().data_ptr()] = tensor.memory
            return tensor.inner

        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        stream = self._runtime.current(index)
        looks = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        tick = None if looks else stream.launch(func, *_accesses(func, args, kwargs))
        self._runtime.contexts.add(index)
        inner_args, inner_kwargs = tree_map_only(PretendTensor, opened, (args, kwargs))
        found = func(*inner_args, **inner_kwargs)

        def wrapped(tensor):
            if hasattr(tensor, "trigger_wait"):  # a functional collective under way
                tensor = tensor.trigger_wait()
            if id(tensor) in known:
                return known[id(tensor)]
            memory = memories.get(tensor.untyped_storage().data_ptr()) if tensor.numel() else None
            if memory is None:
                memory = Memory(stream)
                memory.written = None if tick is None else (stream, tick)
            return PretendTensor(tensor, index, memory)

        if func is not aten.index.Tensor and _VALUES & set(func.tags):
            self._runtime.wait(func, stream.clock)
            if not isinstance(found, torch.Tensor):
                return found
        return tree_map_only(torch.Tensor, wrapped, found)

    def _check(self, func, args, tensors, ours):
        if func.namespace == "c10d":
            return
        # A number of the host goes with the kernel.
        devices = {t.device for t in tensors if isinstance(t, PretendTensor) or t.dim() > 0}
        if len(devices) > 1:
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, not {devices}")
        if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            if masks:
                self._runtime.wait(f"{func} with a mask", self._runtime.current(ours[0].device).clock)

    def _is_pinned(self, tensor):
        if isinstance(tensor, PretendTensor):
            return False
        return tensor.untyped_storage().data_ptr() in self._runtime.pinned

    # -- between devices -------------------------------------------------------------------------

    def _copied(self, func, target, source, non_blocking=False):
        if func is aten.copy_.default:
            self._copy(target, source, non_blocking)
            return target
        for one, other in zip(target, source, strict=True):
            self._copy(one, other, non_blocking)
        return None

    def _moved(self, source, target, kwargs):
        """``source.to(device)``, of another device."""
        own = {**kwargs, "device": torch.device("cpu"), "non_blocking": False}
        non_blocking = kwargs.get("non_blocking", False)
        inner = source.inner if isinstance(source, PretendTensor) else source
        if target == -1:
            if non_blocking:
                raise RuntimeError("nobody would know when a copy to the host without an event is there")
            stream = self._runtime.current(source.device)
            stream.launch("a copy to the host", reads=[source.memory])
            self._runtime.wait("a copy to the host", stream.clock)
            return aten._to_copy.default(inner, **own)
        stream = self._runtime.current(target)
        self._runtime.contexts.add(target)
        made = PretendTensor(aten._to_copy.default(inner, **own), target, Memory(stream))
        self._launch_copy(made, source, non_blocking)
        return made

    def _copy(self, target, source, non_blocking):
        ours = isinstance(target, PretendTensor), isinstance(source, PretendTensor)
        if ours == (False, False):
            target.copy_(source)
        elif ours == (False, True):
            self._to_host(target, source, non_blocking)
        else:
            self._launch_copy(target, source, non_blocking)
            target.inner.copy_(source.inner if ours[1] else source)

    def _launch_copy(self, target, source, non_blocking):
        """A copy to the accelerator, or on it; its values are there at once."""
        stream = self._runtime.current(target.device)
        if isinstance(source, PretendTensor):
            stream.wait_stream(self._runtime.current(source.device))
            stream.launch("a copy", reads=[source.memory], writes=[target.memory])
            self._runtime.current(source.device).wait_stream(stream)
            return
        tick = stream.launch("a copy from the host", writes=[target.memory])
        if source.dim() == 0 and not non_blocking and target.dim() > 0:
            return  # a number travels with the kernel that fills
        if not (non_blocking and self._is_pinned(source) and _is_plain(target, source)):
            self._runtime.wait("a copy from the host that blocks, or from ordinary memory", stream.clock)
            return
        before = source.clone()

        def finish():
            if not torch.equal(source.view(torch.uint8), before.view(torch.uint8)):
                self._runtime.faults.append("page-locked memory was changed while it was copied from")

        self._runtime.later(stream, tick, finish)

    def _to_host(self, target, source, non_blocking):
        stream = self._runtime.current(source.device)
        tick = stream.launch("a copy to the host", reads=[source.memory])
        if not (non_blocking and self._is_pinned(target) and _is_plain(target, source)):
            self._runtime.wait("a copy to the host that blocks, or to ordinary memory", stream.clock)
            target.copy_(source.inner)
            return
        target.copy_(_poison(target))
        # The values that are there then; the tensor itself may be gone.
        inner = source.inner
        self._runtime.later(stream, tick, lambda: target.copy_(inner))


def pinned_like(runtime, tensor):
    """New page-locked memory of a tensor's shape."""
    runtime.touch()
    made = torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")
    runtime.pinned[made.untyped_storage().data_ptr()] = made
    return made


def _wanted(runtime, kwargs):
    """The number of the device that an operator is to make its result on; -1: the CPU; None: not said."""
    if kwargs.get("device") is None:
        return None
    device = torch.device(kwargs["device"])
    if device.type == "cuda" or (device.type == "meta" and device.index is not None):
        return runtime.index_of(device)
    return -1 if device.type == "cpu" else None


def _poison(target):
    """NaN, -1, true, or where any byte may be right, some that are not all alike."""
    if target.dtype is torch.bool:
        return torch.ones(target.shape, dtype=torch.bool)
    if target.dtype is torch.uint8:
        return (torch.arange(target.numel()) % 3).view(target.shape).to(torch.uint8)
    return torch.full((target.nbytes,), 0xFF, dtype=torch.uint8).view(target.dtype).view(target.shape)


def _is_plain(target, source):
    """Whether a copy needs no temporary memory on the host, which would be ordinary memory."""
    host = target if isinstance(source, PretendTensor) else source
    return target.dtype == source.dtype and host.is_contiguous()


def _index(tensor):
    return tensor.device.index if isinstance(tensor, PretendTensor) else -1


def _accesses(func, args, kwargs):
    """The memory that an operator reads, and that it writes."""
    if func.namespace == "c10d":  # whose schemas do not say it
        return [], [leaf.memory for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, PretendTensor)]
    reads, writes = [], []
    for position, argument in enumerate(func._schema.arguments):
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        written = argument.alias_info is not None and argument.alias_info.is_write
        for leaf in tree_leaves(value):
            if isinstance(leaf, PretendTensor):
                (writes if written else reads).append(leaf.memory)
    return reads, writes
