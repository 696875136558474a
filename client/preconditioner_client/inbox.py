"""What came from the service and waits for the training thread.

The heavy part (checks, unpacking) is in :func:`unpack_arrival`, for a background thread; :class:`Inbox` is a
plain data structure that its owner guards with a lock.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch

from preconditioner_client.exchange import Arrival, Rejection
from preconditioner_protos import PackedBlock, unpack

_REJECTIONS_PER_BLOCK = 16

HOST = torch.device("cpu")


class NotFiniteError(ValueError):
    """A preconditioner that holds NaN or infinity."""


def unpack_arrival(packed: PackedBlock, sides: Sequence[int], device: torch.device = HOST) -> Arrival:
    """Full, exactly symmetric float32 tensors of a received block.

    NumPy does the work, and not torch: torch would start a second pool of compute threads beside the
    trainer's.

    Args:
        packed: whole and with the right checksums.
        sides: side lengths of the block.
        device: that they go on to. For CUDA they are in page-locked memory, from which it copies without the
            host's help.

    Raises:
        NotFiniteError: a value is NaN or infinite.
    """
    full = []
    for side, (values, n) in enumerate(zip(packed.sides, sides, strict=True)):
        if not np.isfinite(values).all():
            raise NotFiniteError(f"side {side} of block {packed.block} step {packed.step} is not finite")
        matrix_NN = torch.from_numpy(unpack(values, n).astype(np.float32, copy=False))
        full.append(_page_locked(matrix_NN, device) if device.type == "cuda" else matrix_NN)
    return Arrival(packed.block, packed.step, tuple(full))


def _page_locked(matrix_NN: torch.Tensor, device: torch.device) -> torch.Tensor:
    try:
        # A thread begins on the first device, and torch would ask there for what is free, and make a context.
        with torch.cuda.device(device):
            host_NN = torch.empty(matrix_NN.shape, dtype=matrix_NN.dtype, device="cpu", pin_memory=True)
    except RuntimeError:  # there is no more of such memory, or no accelerator: slower, but as good
        return matrix_NN
    np.copyto(host_NN.numpy(), matrix_NN.numpy())
    return host_NN


class Inbox:
    """Arrivals and rejections in order of arrival, each given out once.

    Holds at most ``per_block`` preconditioners of a block that were not collected; the oldest gives way.

    Args:
        per_block: see above.
    """

    def __init__(self, per_block: int = 1) -> None:
        if per_block < 1:
            raise ValueError(f"per_block must be >= 1, not {per_block}")
        self._per_block = per_block
        self._items: OrderedDict[tuple[int, int, bool], Arrival | Rejection] = OrderedDict()
        self._steps: dict[int, list[int]] = {}
        self._rejected: dict[int, list[int]] = {}
        self._newest: dict[int, int] = {}
        self.superseded = 0
        """Preconditioners that gave way to newer ones before they were collected."""

    def __len__(self) -> int:
        return len(self._items)

    def arrived(self) -> list[int]:
        """The block of every preconditioner that waits."""
        return [block for block, _, arrived in self._items if arrived]

    def is_new(self, block: int, step: int) -> bool:
        """Whether (block, step) is newer than all preconditioners of its block so far."""
        return step > self._newest.get(block, -1)

    def deliver(self, arrival: Arrival) -> bool:
        """Take a preconditioner.

        Returns:
            False if it is not newer than the last of its block; it is dropped then.
        """
        block = arrival.block
        if not self.is_new(block, arrival.step):
            return False
        self._newest[block] = arrival.step
        steps = self._steps.setdefault(block, [])
        steps.append(arrival.step)
        self._items[block, arrival.step, True] = arrival
        if len(steps) > self._per_block:
            del self._items[block, steps.pop(0), True]
            self.superseded += 1
        return True

    def reject(self, rejection: Rejection) -> None:
        """Take the news that no preconditioner will come.

        Repeated news of one version are one, and of a block that nobody collects only the latest are kept.
        """
        key = (rejection.block, rejection.step, False)
        if key not in self._items:
            steps = self._rejected.setdefault(rejection.block, [])
            steps.append(rejection.step)
            if len(steps) > _REJECTIONS_PER_BLOCK:
                del self._items[rejection.block, steps.pop(0), False]
        self._items[key] = rejection

    def collect(self) -> list[Arrival | Rejection]:
        """Everything that waits, in order of arrival."""
        items = list(self._items.values())
        self._items.clear()
        self._steps.clear()
        self._rejected.clear()
        return items
