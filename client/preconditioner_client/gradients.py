"""What a gradient must be before anything is done with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from preconditioner_client.distribution import local
from preconditioner_client.foreach import Tensors, cast, cast_like, picked, positions_by_kind
from preconditioner_client.grafting import owns_weight_decay
from preconditioner_client.guard import Guard, is_deferred
from preconditioner_client.transfer import upload


def check_parameter(parameter: torch.Tensor, name: str) -> None:
    """Refuse parameters that have no Kronecker statistics here.

    Raises:
        ValueError: complex or not floating point.
    """
    if parameter.is_complex():
        raise ValueError(
            f"{name} is complex ({parameter.dtype}): give torch.view_as_real() of it to the optimizer, or "
            f"train it with another one"
        )
    if not parameter.is_floating_point():
        raise ValueError(f"{name} has dtype {parameter.dtype}; only floating-point parameters can be trained")


def refuse_capture(groups: Sequence[dict[str, Any]]) -> None:
    """Refuse a step that is captured into a CUDA graph: what it does differs from step to step.

    Args:
        groups: the optimizer's.

    Raises:
        RuntimeError: the current stream is being captured.
    """
    on_cuda = any(p.is_cuda for group in groups for p in group["params"])
    if on_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "step() cannot be captured into a CUDA graph: the host decides in each step which "
            "preconditioners are adopted. Capture forward and backward passes alone, and call step() after "
            "the graph's replay()"
        )


Place = tuple[torch.Size, torch.device]
"""Shape and device of a parameter."""


def check_places(parameters: Sequence[tuple[str, torch.Tensor]], places: Sequence[Place]) -> None:
    """Refuse parameters that are not as their blocks were cut, as after ``p.data = other`` or ``model.to``.

    Args:
        parameters: of all groups that were cut, with their names.
        places: as they were then.

    Raises:
        ValueError: naming the first parameter concerned.
    """
    # The usual case is to be quick: it comes in every step.
    if [(parameter.shape, parameter.device) for _, parameter in parameters] == places:
        return
    for (name, parameter), (shape, device) in zip(parameters, places, strict=True):
        if parameter.device != device:
            raise ValueError(
                f"{name} is on {parameter.device}, but was on {device} in the first step, and so are its "
                f"statistics; nothing was updated. Move the model before the first step, or load the "
                f"state_dict() into an optimizer made anew"
            )
        if parameter.shape != shape:
            raise ValueError(
                f"{name} has the shape {tuple(parameter.shape)}, but had {tuple(shape)} when its blocks were "
                f"cut; nothing was updated. Make the optimizer anew after a parameter changed its shape"
            )


def check_same_groups(
    groups: Sequence[Sequence[torch.Tensor]],
    planned: Sequence[torch.Tensor],
    names: Sequence[Sequence[str]],
) -> None:
    """Refuse groups that were changed by hand, whose parameters would meet the blocks of others.

    One that is replaced by another of its shape goes on with its blocks.

    Args:
        groups: the parameters as they are now.
        planned: those of all groups, as they were cut.
        names: of these, for each group.

    Raises:
        ValueError: naming the group and, where it is one that was replaced, the parameter.
    """
    way_out = "nothing was updated. Add parameters by add_param_group(), or make the optimizer anew"
    if len(groups) != len(names):
        raise ValueError(f"there were {len(names)} parameter groups, and now are {len(groups)}; {way_out}")
    position = 0
    for number, (group, of_group) in enumerate(zip(groups, names, strict=True)):
        if len(group) != len(of_group):
            raise ValueError(
                f"parameter group {number} had {len(of_group)} parameters when its blocks were cut, and has "
                f"{len(group)} now; {way_out}"
            )
        for new, name in zip(group, of_group, strict=True):
            old = planned[position]
            position += 1
            if new is not old and new.shape != old.shape:
                raise ValueError(
                    f"{name} of the shape {tuple(old.shape)} was replaced in parameter group {number} by a "
                    f"parameter of the shape {tuple(new.shape)}; {way_out}"
                )


def held_gradients(parameters: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    """What this rank holds of gradients that are looked at only, in the memory in which they are.

    Of a sparse one its values, of a complex one pairs of real numbers. Parameters without a gradient give
    None.
    """
    return [None if p.grad is None else _held(local(p.grad)) for p in parameters]


def _held(gradient: torch.Tensor) -> torch.Tensor:
    values = gradient._values() if gradient.is_sparse else gradient
    return torch.view_as_real(values) if values.is_complex() else values


def working_gradients(group: dict[str, Any], names: Sequence[str]) -> list[torch.Tensor | None]:
    """Gradients of a group in the dtype of the arithmetic, with sign and coupled weight decay applied.

    Half precision becomes float32. Parameters without a gradient give None; sharded ones what this rank holds
    of theirs, which may be empty.

    Raises:
        RuntimeError: a sparse gradient.
    """
    present = [(i, local(p.grad)) for i, p in enumerate(group["params"]) if p.grad is not None]
    for index, gradient in present:
        if gradient.is_sparse:
            raise RuntimeError(
                f"the gradient of {names[index]} is sparse, which Shampoo cannot precondition: use "
                f"sparse=False in its embedding, put it into torch.optim.SparseAdam, or let attach() leave "
                f"its group alone (groups={{number: None}})"
            )
    gradients: list[torch.Tensor | None] = [None] * len(group["params"])
    for positions in positions_by_kind([gradient for _, gradient in present]):
        indices = [present[position][0] for position in positions]
        given = [present[position][1] for position in positions]
        found = _worked(group, given, picked(group["params"], indices))
        for index, gradient in zip(indices, found, strict=True):
            gradients[index] = gradient
    return gradients


def _worked(group: dict[str, Any], given: Tensors, parameters: Tensors) -> Tensors:
    """:func:`working_gradients` of parameters whose gradients have one device and one dtype."""
    # Only copies are changed in place: gradients stay as they were given.
    own = given[0].dtype in (torch.float16, torch.bfloat16)
    found = cast(given, [torch.float32] * len(given)) if own else given
    if group["maximize"]:
        if own:
            torch._foreach_neg_(found)
        else:
            found, own = list(torch._foreach_neg(found)), True
    coupled = group["weight_decay"]
    if coupled and not group["decoupled_weight_decay"] and not owns_weight_decay(group["grafting"]):
        weights = cast_like([local(parameter) for parameter in parameters], found)
        if own:
            torch._foreach_add_(found, weights, alpha=coupled)
        else:
            found = list(torch._foreach_add(found, weights, alpha=coupled))
    return found


def only_initialises(
    optimizer: Optimizer,
    gradients: Sequence[Sequence[torch.Tensor | None]],
    step: int,
    maximum: Callable[[torch.Tensor], None],
) -> bool:
    """Whether a step is torch.distributed.checkpoint's, which wants nothing but the state's tensors.

    It calls ``step()`` on an optimizer without state, with a learning rate of 0 and gradients of zero. That
    must count as no step, touch no statistics and start no session. A warm-up that begins at 0 looks alike to
    a rank whose rows have gradients of zero, or that has no rows, so shards decide together.

    Args:
        optimizer: the user's, or one of those here.
        gradients: what this rank holds of them, at least one.
        step: number of the latest step, the same on all ranks.
        maximum: see :func:`check_finite`. Called only before the first step or without state, and where
            learning rates are 0, or lie on an accelerator and are not known without waiting for it.
    """
    # One rank may have made its state before the others, as for a checkpoint, but not for longer than a step.
    if optimizer.state and step > 0:
        return False
    deferred: list[torch.Tensor] = []
    for rate in (group.get("lr") for group in optimizer.param_groups):
        if isinstance(rate, torch.Tensor) and is_deferred(rate.device):
            deferred.append(rate)
        # One that finds its own rates has None here, or no such key.
        elif rate is None or float(rate) != 0:
            return False
    present = [g for of_group in gradients for g in of_group if g is not None]
    trains = (
        bool(optimizer.state)
        or any(bool(rate) for rate in deferred)
        or any(bool(g.count_nonzero()) for g in present)
    )
    verdict = torch.full((1,), int(trains), dtype=torch.int32, device=present[0].device)
    maximum(verdict)
    return not (trains or bool(verdict))


def judge(
    present: Sequence[tuple[str, torch.Tensor]],
    maximum: Callable[[torch.Tensor], None],
    found_inf: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Guard]:
    """As :func:`check_finite`, but the host waits for nothing; all gradients are zero where one is bad.

    Args:
        present: all gradients, on one device, with the names of their parameters.
        maximum: see :func:`check_finite`.
        found_inf: not 0 if the step is to be without effect anyway.

    Returns:
        For each gradient 1 if it is not finite, else 0; and what keeps a bad step from having an effect.
    """
    gradients = [gradient for _, gradient in present]
    verdict = not_finite(gradients)
    maximum(verdict)
    bad = verdict.any()
    if found_inf is not None:
        # GradScaler's own device may be another.
        bad = bad | found_inf.any().to(bad.device, non_blocking=True)
    guard = Guard(bad)
    guard.clear_(gradients)
    return verdict, guard


def check_finite(
    present: Sequence[tuple[str, torch.Tensor]], maximum: Callable[[torch.Tensor], None] | None = None
) -> None:
    """Refuse NaN and infinity before they reach statistics, moments or weights.

    Args:
        present: what this rank holds of all gradients, with the names of their parameters.
        maximum: where ranks hold different rows, takes the elementwise maximum of a tensor over them, in
            place, so that all come to the same verdict. The host waits once, as without it.

    Raises:
        ValueError: naming the first parameter concerned.
    """
    by_device: dict[torch.device, list[int]] = {}
    for position, (_, gradient) in enumerate(present):
        by_device.setdefault(gradient.device, []).append(position)
    verdicts = [
        (positions, not_finite([present[position][1] for position in positions]))
        for positions in by_device.values()
    ]
    if maximum is not None:
        for _, bad in verdicts:
            maximum(bad)
    if not any(bool(bad.any()) for _, bad in verdicts):
        return
    concerned = (
        position
        for positions, bad in verdicts
        for position, is_bad in zip(positions, bad.tolist(), strict=True)
        if is_bad
    )
    name, gradient = present[min(concerned)]
    count = int((~gradient.isfinite()).sum())
    raise ValueError(
        f"the gradient of {name} holds {count or 'on another rank'} NaN or infinite values; nothing was "
        f"updated. Skip the step, clip, or scale the loss (torch.amp.GradScaler)"
    )


def named(
    gradients: Sequence[Sequence[torch.Tensor | None]], names: Sequence[Sequence[str]]
) -> list[tuple[str, torch.Tensor]]:
    """The gradients of all groups that are there, with the names of their parameters."""
    return [
        (name, gradient)
        for of_group, group_names in zip(gradients, names, strict=True)
        for gradient, name in zip(of_group, group_names, strict=True)
        if gradient is not None
    ]


def not_finite(gradients: list[torch.Tensor]) -> torch.Tensor:
    """For each gradient of a device 1 if it holds NaN or infinity, else 0."""
    # Norms of nothing there are none.
    filled = [index for index, gradient in enumerate(gradients) if gradient.numel()]
    bad = torch.zeros(len(gradients), dtype=torch.int32, device=gradients[0].device)
    if filled:
        held = [gradients[index] for index in filled]
        # On the CPU a sum of squares takes a tenth of a maximum's time. It may overflow for finite gradients,
        # so that it can acquit only; on an accelerator to look at it would be to wait for it.
        if bad.device.type == "cpu" and _finite(torch._foreach_norm(held)).all():
            return bad
        found = ~_finite(torch._foreach_norm(held, ord=float("inf")))
        if len(filled) == len(gradients):
            return found.to(torch.int32)
        bad.index_copy_(0, upload(filled, torch.int64, bad.device), found.to(torch.int32))
    return bad


def _finite(norms: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(norms)).to(torch.float32).isfinite()
