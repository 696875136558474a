"""What tensors are alive while an optimizer steps: bytes of all storages but those that were there before."""

from __future__ import annotations

import contextlib
import dataclasses

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from preconditioner_client.distribution import like, local
from scripted_exchange import ScriptedExchange


class LiveTensors(TorchDispatchMode):
    """The largest sum, after any operation, of the storages that operations made or saw, while they live.

    Args:
        known: tensors that do not count.
    """

    def __init__(self, known):
        super().__init__()
        self._known = {local(tensor).untyped_storage()._cdata for tensor in known}
        self._alive = {}
        self._bytes = 0
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, torch.Tensor):
                storage = local(tensor).untyped_storage()
                if storage._cdata not in self._known and storage._cdata not in self._alive:
                    self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                    self._bytes += storage.nbytes()
        if self._bytes > self.peak:
            self._forget_the_dead()
            self.peak = max(self.peak, self._bytes)
        return result

    def bytes_now(self):
        """Of the storages that are alive."""
        self._forget_the_dead()
        return self._bytes

    def _forget_the_dead(self):
        # A weak reference keeps the address, so that none is taken for another meanwhile.
        self._alive = {i: pair for i, pair in self._alive.items() if not pair[0].expired()}
        self._bytes = sum(size for _, size in self._alive.values())


class Waiting(ScriptedExchange):
    """A service at its limits: of every block as many matrices wait, both ways, as a session allows."""

    def offer(self, snapshots, step):
        for snapshot in snapshots:
            own = [s for s in self.offered if s.block == snapshot.block]
            if len(own) == self.session.snapshots_in_flight:
                self.offered.remove(own[0])
            self.offered.append(snapshot)
            self.answer(snapshot.block, snapshot.step)

    def collect(self, step):
        due = [arrival for arrival in self.inbox if arrival.step < step]
        self.inbox = [arrival for arrival in self.inbox if arrival.step >= step]
        return due


def peak_of_steps(optimizer, steps=5, adopts=True, metrics=None):
    """Bytes of tensors beside parameters and gradients, at the worst moment of some steps."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters:
        held = torch.randn(local(parameter.detach()).shape, generator=generator)
        parameter.grad = like(parameter, held.to(parameter.dtype))
    live = LiveTensors([*parameters, *(p.grad for p in parameters)])
    with live:
        for _ in range(steps):
            optimizer.step()
    assert ((metrics or optimizer.metrics)()["versions_adopted"] > 0) == adopts
    return live.peak


def peaks_of_training(model, optimizer, backward, known, passes=1, during_backward=True):
    """Bytes of tensors beside model, gradients and batch, at worst: at any moment, and after a step.

    Args:
        model: what is trained.
        optimizer: what the tensors are of.
        backward: the forward and backward pass.
        known: tensors of the batch.
        passes: how often it is made for a step.
        during_backward: else only what it leaves is counted.
    """
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in model.parameters()]
    live = LiveTensors([*known, *model.parameters(), *model.buffers(), *gradients])
    after = 0
    for _ in range(6):
        optimizer.zero_grad(set_to_none=False)
        with live if during_backward else contextlib.nullcontext():
            for _ in range(passes):
                backward()
        with live:
            optimizer.step()
        after = max(after, live.bytes_now())
    return live.peak, after


def assert_is_bound(estimate, peak, after):
    """Hold an estimate against what :func:`peaks_of_training` found: above it, and not far."""
    # What the wire has under way is in no tensor.
    expected = estimate.total - estimate.in_flight
    print(f"formula / measured {expected / peak:.3f}, {peak=} {dataclasses.asdict(estimate)}")
    assert peak <= expected <= 1.3 * peak
    kept = estimate.persistent + estimate.outbox + estimate.inbox
    # Some numbers that are kept are counted with the temporaries.
    assert 0.999 * after <= kept <= 1.3 * after
