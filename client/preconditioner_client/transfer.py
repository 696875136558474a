"""Copies between an accelerator and the host that the training thread never waits for.

Snapshots leave through pinned memory on a stream of their own; arrivals come in the same way, on another, and
are handed on once their copy is done. On the CPU nothing of this is needed, and nothing is done.

What belongs to the host says so, since ``torch.set_default_device`` may have made another the default.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy.typing as npt
import torch

from preconditioner_client.exchange import Arrival, Exchange, Rejection, SessionSpec, Snapshot

_streams: dict[tuple[torch.device, bool], torch.cuda.Stream] = {}


def side_stream(device: torch.device, inward: bool) -> torch.cuda.Stream:
    """The stream for copies to (``inward``) or from a CUDA device, made at first use.

    One for each way: what leaves waits for the steps before it, and what arrives must not stand behind that.
    """
    key = device, inward
    if key not in _streams:
        _streams[key] = torch.cuda.Stream(device)
    return _streams[key]


def upload(
    values: Sequence[float] | npt.NDArray[Any], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """A 1-D tensor of numbers on a device. ``torch.tensor(.., device=..)`` would wait for the device."""
    host = torch.tensor(values, dtype=dtype, device="cpu")
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)


def to_host(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """Begin to copy a tensor to the host.

    Returns:
        The host tensor, and the event after which it may be read; None: at once. A CPU tensor is returned as
        it is.
    """
    if tensor.device.type != "cuda":
        return tensor.cpu(), None
    stream = side_stream(tensor.device, inward=False)
    host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
    stream.wait_stream(torch.cuda.current_stream(tensor.device))
    with torch.cuda.stream(stream):
        host.copy_(tensor, non_blocking=True)
        event = torch.cuda.Event()
        event.record(stream)
    # The allocator must not hand this memory to the training stream before the copy is done.
    tensor.record_stream(stream)
    return host, event


def keep_until_used(tensors: Sequence[torch.Tensor]) -> None:
    """Keep memory that may be of a side stream's until the work launched so far is done with it.

    To be called where tensors were read. A stream that was current when they came need not be the one now.
    """
    for tensor in tensors:
        if tensor.device.type == "cuda":
            tensor.record_stream(torch.cuda.current_stream(tensor.device))


class UploadingExchange:
    """An exchange whose arrivals are on the accelerator when they are collected.

    Their memory is the side stream's: whoever reads them says so, see :func:`keep_until_used`.

    Args:
        inner: where the arrivals come from, on the CPU.
        devices: per block of the session where its preconditioners belong.
    """

    def __init__(self, inner: Exchange, devices: Sequence[torch.device]) -> None:
        self._inner = inner
        self._devices = devices
        self._under_way: list[tuple[Arrival, torch.cuda.Event]] = []

    @property
    def generation(self) -> int:
        """See :class:`Exchange`."""
        return self._inner.generation

    def open(self, session: SessionSpec) -> None:
        """See :class:`Exchange`."""
        self._under_way.clear()
        self._inner.open(session)

    def offer(self, snapshots: Sequence[Snapshot], step: int) -> None:
        """See :class:`Exchange`."""
        self._inner.offer(snapshots, step)

    def collect(self, step: int) -> list[Arrival | Rejection]:
        """See :class:`Exchange`. Arrivals whose copy is not done yet come with a later call."""
        collected: list[Arrival | Rejection] = []
        for event in self._inner.collect(step):
            if isinstance(event, Rejection) or self._devices[event.block].type != "cuda":
                collected.append(event)
            else:
                self._under_way.append(self._upload(event))
        # In order, so that an older version of a block never overtakes a newer one.
        while self._under_way and self._under_way[0][1].query():
            collected.append(self._under_way.pop(0)[0])
        return collected

    def wait(self, timeout: float) -> bool:
        """See :class:`Exchange`."""
        if self._under_way:
            self._under_way[0][1].synchronize()
            return True
        return self._inner.wait(timeout)

    def counters(self) -> dict[str, int]:
        """See :class:`Exchange`."""
        return self._inner.counters()

    def close(self) -> None:
        """See :class:`Exchange`."""
        self._under_way.clear()
        self._inner.close()

    def _upload(self, arrival: Arrival) -> tuple[Arrival, torch.cuda.Event]:
        device = self._devices[arrival.block]
        stream = side_stream(device, inward=True)
        with torch.cuda.stream(stream):
            # Most come in page-locked memory already, and pin_memory() returns these as they are.
            sides = tuple(side.pin_memory().to(device, non_blocking=True) for side in arrival.sides)
            event = torch.cuda.Event()
            event.record(stream)
        return Arrival(arrival.block, arrival.step, sides), event
