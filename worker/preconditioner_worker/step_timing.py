"""The time of a step, of the optimizer alone or of the whole training, and what it launches."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator

import torch
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile

from preconditioner_client import Shampoo
from preconditioner_worker.gpt2 import GPT2

FIRST_VERSIONS_TIMEOUT = 600.0
"""Seconds after which a service that has not answered for every block is given up."""

# Operators that only describe memory anew: nothing is launched for them.
VIEWS = frozenset(
    f"aten::{name}"
    for name in (
        "view", "reshape", "_reshape_alias", "slice", "select", "as_strided", "unbind", "movedim", "permute",
        "flatten", "transpose", "t", "mT", "detach", "expand", "unsqueeze", "squeeze", "alias", "view_as",
        "lift_fresh", "empty", "empty_like", "empty_strided", "resolve_conj", "resolve_neg", "item",
        "_local_scalar_dense", "is_nonzero", "broadcast_tensors",
    )
)  # fmt: skip


class StepTimer:
    """A model and its optimizer, step by step.

    Args:
        build: makes the optimizer.
        model: on its device.
        batch_size: sequences of a training step under bfloat16 autocast; None: gradients are random numbers,
            and only ``optimizer.step()`` is timed.
    """

    def __init__(self, build: Callable[[GPT2], Optimizer], model: GPT2, batch_size: int | None) -> None:
        self.optimizer = build(model)
        self._model = model
        self._batch_size = batch_size
        self._device = next(model.parameters()).device
        self._random = torch.Generator(device=self._device).manual_seed(1)

    def times(self, steps: int) -> list[float]:
        """Milliseconds of each of so many steps."""
        if self._batch_size is None:
            return [self._optimizer_step() for _ in range(steps)]
        return list(_intervals(self._training_steps(self._batch_size, steps), self._device))

    def warm_up(self, steps: int) -> None:
        """At least so many steps, and until every block has a preconditioner.

        Raises:
            TimeoutError: the service did not get so far.
        """
        began = time.monotonic()
        self.times(steps)
        while isinstance(self.optimizer, Shampoo):
            metrics = self.optimizer.metrics()
            if metrics["blocks_with_version"] == metrics["blocks"]:
                return
            if time.monotonic() - began > FIRST_VERSIONS_TIMEOUT:
                raise TimeoutError(
                    f"after {FIRST_VERSIONS_TIMEOUT:.0f} s only {metrics['blocks_with_version']} of "
                    f"{metrics['blocks']} blocks have a preconditioner: is the service able to keep up?"
                )
            # The service may have no other core than this one.
            time.sleep(0.05)
            self.times(1)

    def versions_adopted(self) -> int:
        """Preconditioners taken into use so far."""
        return self.optimizer.metrics()["versions_adopted"] if isinstance(self.optimizer, Shampoo) else 0

    def close(self) -> None:
        """End the exchange, if there is one."""
        if isinstance(self.optimizer, Shampoo):
            self.optimizer.close()

    def _optimizer_step(self) -> float:
        for parameter in self._model.parameters():
            parameter.grad = torch.empty_like(parameter).normal_(generator=self._random)
        self._synchronize()
        began = time.perf_counter()
        self.optimizer.step()
        self._synchronize()
        return (time.perf_counter() - began) * 1e3

    def _training_steps(self, batch_size: int, steps: int) -> Iterator[None]:
        yield
        for _ in range(steps):
            tokens_BT = self._model.random_batch(batch_size)
            self.optimizer.zero_grad()
            with torch.autocast(self._device.type, torch.bfloat16):
                logits_BTV = self._model(tokens_BT[:, :-1])
                loss = F.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, 1:].flatten())
            loss.backward()
            self.optimizer.step()
            yield

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            # Not for snapshots that other streams copy: in training the next step goes on meanwhile.
            torch.cuda.current_stream(self._device).synchronize()


def _intervals(events: Iterator[None], device: torch.device) -> Iterator[float]:
    """Milliseconds between consecutive events."""
    if device.type != "cuda":
        times = [time.perf_counter() for _ in events]
        yield from ((later - earlier) * 1e3 for earlier, later in itertools.pairwise(times))
        return
    marks = []
    for _ in events:
        # The host runs ahead of the device as it does in training, and is waited for only at the end.
        marks.append(torch.cuda.Event(enable_timing=True))
        marks[-1].record(torch.cuda.current_stream(device))
    torch.cuda.synchronize(device)
    yield from (earlier.elapsed_time(later) for earlier, later in itertools.pairwise(marks))


def launches_of(optimizer: Optimizer) -> int:
    """Operators of one step that do work, a foreach operator counted once whatever it is made of."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        optimizer.step()
    return sum(
        event.name.startswith("aten::")
        and event.name not in VIEWS
        # A conversion to what a tensor is already does nothing.
        and (event.name != "aten::to" or bool(event.cpu_children))
        and not (event.cpu_parent is not None and event.cpu_parent.name.startswith("aten::"))
        for event in recorded.events()
    )
