"""Gradients that are not finite, on an accelerator: the step has no effect, and the host learns it later.

On the CPU a step with such a gradient is refused before anything has changed. To know in time, the host would
have to wait for an accelerator once a step. There a :class:`Guard` stands in instead: where a gradient of the
step is not finite, all gradients and updates become zero and all decays become 1, so that statistics, moments
and weights keep their bits. The verdict follows to the host without anybody waiting for it, and
:class:`SkippedSteps` counts.

The step still counts as one: bias corrections reckon with one gradient too many from then on, which shortens
the steps that follow a skip early in training a little. Nothing that the host learns late changes a step, so
replicas stay bit-identical.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence

import torch

from preconditioner_client.transfer import to_host

logger = logging.getLogger("preconditioner_client")

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def is_deferred(device: torch.device) -> bool:
    """Whether the host would have to wait for a value of this device."""
    return device.type != "cpu"


class Guard:
    """The verdict on one step's gradients, on their device.

    Args:
        bad: 0-D bool, whether any gradient of the step is not finite.
    """

    def __init__(self, bad: torch.Tensor) -> None:
        self.bad = bad
        self._good: dict[torch.dtype, torch.Tensor] = {}
        self._factors: dict[tuple[float, torch.dtype], torch.Tensor] = {}

    def clear_(self, tensors: Sequence[torch.Tensor]) -> None:
        """Set all values to zero, NaN too, if the step is bad; else leave every bit."""
        for integers in self._as_integers(tensors).values():
            torch._foreach_mul_(integers, self._whether_good(integers[0].dtype))

    def decay_(self, tensors: Sequence[torch.Tensor], factor: float) -> None:
        """Multiply by a factor, unless the step is bad."""
        by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
        for tensor in tensors:
            by_dtype.setdefault(tensor.dtype, []).append(tensor)
        for dtype, of_dtype in by_dtype.items():
            torch._foreach_mul_(of_dtype, self._factor(factor, dtype))

    def _as_integers(self, tensors: Sequence[torch.Tensor]) -> dict[torch.dtype, list[torch.Tensor]]:
        """The same memory as integers: for every pattern of bits 0 times it is 0, and 1 times it the same."""
        by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
        for tensor in tensors:
            dtype = _INTEGERS[tensor.element_size()]
            by_dtype.setdefault(dtype, []).append(tensor.view(dtype))
        return by_dtype

    def _whether_good(self, dtype: torch.dtype) -> torch.Tensor:
        if dtype not in self._good:
            self._good[dtype] = self.bad.logical_not().to(dtype)
        return self._good[dtype]

    def _factor(self, factor: float, dtype: torch.dtype) -> torch.Tensor:
        key = (factor, dtype)
        if key not in self._factors:
            whole = torch.full((), factor, dtype=dtype, device=self.bad.device)
            self._factors[key] = whole.masked_fill_(self.bad, 1.0)
        return self._factors[key]


class SkippedSteps:
    """Counts bad steps as their verdicts reach the host, and logs the first of each row of them."""

    def __init__(self) -> None:
        self.count = 0
        """Steps known to have had no effect, since a gradient was not finite."""
        self._under_way: deque[tuple[int, Sequence[str], torch.Tensor, torch.cuda.Event | None]] = deque()
        self._in_a_row = False

    def note(self, step: int, names: Sequence[str], verdict: torch.Tensor) -> None:
        """A step's verdict sets out for the host.

        Args:
            step: its number.
            names: of the parameters with a gradient.
            verdict: for each of them 1 if its gradient is not finite, else 0.
        """
        self._under_way.append((step, names, *to_host(verdict)))
        self.poll()

    def poll(self) -> None:
        """Count what has arrived. Waits for nothing."""
        while self._under_way and (self._under_way[0][3] is None or self._under_way[0][3].query()):
            step, names, verdict, _ = self._under_way.popleft()
            found = verdict.numpy().nonzero()[0]
            if found.size and not self._in_a_row:
                logger.warning(
                    "step %d had no effect: the gradient of %s held NaN or infinite values. Lower the "
                    "learning rate, clip, or scale the loss (torch.amp.GradScaler)",
                    step,
                    names[int(found[0])],
                )
            self.count += bool(found.size)
            self._in_a_row = bool(found.size)
