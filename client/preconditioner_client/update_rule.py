"""The arithmetic of a step around the preconditioner: moments, grafting, momentum, weight decay.

Steps are numbered as in :mod:`preconditioner_client.shampoo`. All tensors are what this rank holds of them.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, cast

import torch

from preconditioner_client.averaging import Averaging, averages_first
from preconditioner_client.config import GraftingConfig
from preconditioner_client.distribution import like, local
from preconditioner_client.engine import Engine
from preconditioner_client.foreach import Tensors, cast_like, picked, positions_by_kind
from preconditioner_client.grafting import (
    directions,
    needs_second_moment,
    owns_weight_decay,
    update_second_moments,
)
from preconditioner_client.guard import Guard
from preconditioner_client.plan import GroupPlan
from preconditioner_client.schedule import Mask

MaybeTensors = list[torch.Tensor | None]
States = defaultdict[torch.Tensor, Any]


def directions_of(
    engine: Engine,
    states: States,
    group: dict[str, Any],
    plan: GroupPlan,
    gradients: MaybeTensors,
    usable: Mask,
    guard: Guard | None = None,
) -> MaybeTensors:
    """Steps 3 and 4: directions of all parameters with a gradient, the blocks of this rank preconditioned.

    And momentum, where it comes before grafting, see :mod:`preconditioner_client.averaging`.

    Args:
        engine: that preconditions.
        states: of the optimizer; moments advance.
        group: of parameters.
        plan: of the group.
        gradients: of the group, what this rank holds of them.
        usable: as :meth:`Engine.advance` returned it.
        guard: as :meth:`Engine.examine` returned it.

    Returns:
        New contiguous tensors; None for a parameter without a gradient.
    """
    grafting: GraftingConfig = group["grafting"]
    present = [i for i, g in enumerate(gradients) if g is not None]
    if not present:
        return gradients
    grads = [cast(torch.Tensor, gradients[i]) for i in present]
    own = states_of(states, group, gradients)
    for state in own:
        state["step"] += 1
    steps = [int(state["step"]) for state in own]

    filtered = grads
    if group["beta1"] > 0:
        averages = [local(state["exp_avg"]) for state in own]
        if guard is None:
            torch._foreach_lerp_(averages, grads, 1 - group["beta1"])
        else:
            guard.decay_(averages, group["beta1"])
            torch._foreach_add_(averages, grads, alpha=1 - group["beta1"])
        filtered = list(torch._foreach_div(averages, [1 - group["beta1"] ** t for t in steps]))
    moments = [local(state["second_moment"]) for state in own] if needs_second_moment(grafting) else []
    if moments:
        update_second_moments(grafting, moments, grads, guard)
    # Only these methods read the weights, and half precision is copied for it.
    weights = (
        cast_like([local(group["params"][i]).detach() for i in present], grads)
        if owns_weight_decay(grafting)
        else []
    )
    norms = engine.ranks.norms
    diagonal = directions(grafting, filtered, moments, steps, weights, group["weight_decay"], norms)
    diagonal = [d.contiguous() for d in diagonal]
    averaging = Averaging.of(group, guard)
    if averaging is not None:
        averaging.average_directions([local(state["momentum_buffer"]) for state in own], diagonal)
    updates = _spread(diagonal, present, gradients)
    sources = _spread(filtered, present, gradients)
    engine.precondition(plan, sources, updates, grafting, usable, averaging)
    return updates


def apply_updates(
    states: States, group: dict[str, Any], updates: MaybeTensors, guard: Guard | None = None
) -> None:
    """Step 5, for every parameter that has an update: momentum, weight decay, and the step itself.

    Momentum that comes before grafting has been there already.

    Args:
        states: of the optimizer; momentum buffers advance.
        group: of parameters.
        updates: of :func:`directions_of`, complete; they may be overwritten.
        guard: as :meth:`Engine.examine` returned it.
    """
    present = [(p, u) for p, u in zip(group["params"], updates, strict=True) if u is not None]
    if not present:
        return
    found = [u for _, u in present]
    params = [local(p) for p, _ in present]
    if guard is not None:
        guard.clear_(found)
    if group["momentum"] > 0 and not averages_first(group):
        found = _momentum(group, [p for p, _ in present], states, found, guard)
    lr = group["lr"]
    if isinstance(lr, torch.Tensor) and lr.device.type == "cpu":
        # Nothing is waited for, and it rounds as a number does, also where parameters are in half precision.
        lr = float(lr)
    decay = group["weight_decay"]
    if decay != 0 and group["decoupled_weight_decay"] and not owns_weight_decay(group["grafting"]):
        if guard is None and isinstance(lr, torch.Tensor):
            for positions in positions_by_kind(params):
                of_kind = picked(params, positions)
                kept = (1 - lr * decay).to(of_kind[0].device, of_kind[0].dtype).reshape(())
                torch._foreach_mul_(of_kind, kept)
        elif guard is None:
            torch._foreach_mul_(params, 1 - lr * decay)
        else:
            # Within the update, which can be cleared: the same but for rounding.
            found = list(torch._foreach_add(found, cast_like(params, found), alpha=decay))
            guard.clear_(found)
    found = cast_like(found, params)
    if isinstance(lr, torch.Tensor):
        for positions in positions_by_kind(found):
            of_kind = picked(found, positions)
            rate = lr.to(of_kind[0].device, of_kind[0].dtype).reshape(())
            torch._foreach_sub_(picked(params, positions), torch._foreach_mul(of_kind, rate))
    else:
        torch._foreach_add_(params, found, alpha=-lr)


def states_of(
    states: States, group: dict[str, Any], gradients: MaybeTensors, momentum_too: bool = False
) -> list[dict[str, Any]]:
    """State of every parameter with a gradient, made where it is missing.

    Args:
        states: of the optimizer.
        group: of parameters.
        gradients: of the group; state has their dtype, and the placement of the parameters.
        momentum_too: make the momentum's buffer as well, which otherwise comes with the first update.
    """
    wanted = state_keys(group) if momentum_too else lasting_keys(group)
    found = []
    for parameter, gradient in zip(group["params"], gradients, strict=True):
        if gradient is None:
            continue
        state: dict[str, Any] = states[parameter]
        state.setdefault("step", 0)
        for key in wanted:
            if key not in state:
                state[key] = like(parameter, torch.zeros_like(gradient))
        found.append(state)
    return found


def state_keys(group: dict[str, Any]) -> list[str]:
    """Which elementwise tensors a parameter of the group has in its state, once it was updated."""
    keys = {
        "exp_avg": group["beta1"] > 0,
        "second_moment": needs_second_moment(group["grafting"]),
        "momentum_buffer": group["momentum"] > 0 or averages_first(group),
    }
    return [key for key, kept in keys.items() if kept]


def lasting_keys(group: dict[str, Any]) -> list[str]:
    """Those of :func:`state_keys` that no updated parameter is without.

    The average of grafted updates begins with one; the other order's begin at 0.
    """
    return [key for key in state_keys(group) if key != "momentum_buffer" or averages_first(group)]


def complete_state(state: dict[str, Any], group: dict[str, Any], parameter: torch.Tensor) -> None:
    """Add what :func:`states_of` would in the next step, to a state that was updated."""
    if "step" in state and not state.keys() >= set(lasting_keys(group)):
        blank = blank_state(group, parameter)
        for key in lasting_keys(group):
            state.setdefault(key, blank[key])


def blank_state(group: dict[str, Any], parameter: torch.Tensor) -> dict[str, Any]:
    """State of a parameter of the group before its first update."""
    held = local(parameter).detach()
    half = held.dtype in (torch.float16, torch.bfloat16)
    dtype = torch.float32 if half else held.dtype
    moments = {key: like(parameter, torch.zeros_like(held, dtype=dtype)) for key in state_keys(group)}
    return {"step": 0, **moments}


def _spread(tensors: Tensors, present: list[int], pattern: MaybeTensors) -> MaybeTensors:
    """Tensors of the parameters that have a gradient, at their positions in the group."""
    spread: MaybeTensors = [None] * len(pattern)
    for position, tensor in zip(present, tensors, strict=True):
        spread[position] = tensor
    return spread


def _momentum(
    group: dict[str, Any], params: Tensors, states: States, updates: Tensors, guard: Guard | None
) -> Tensors:
    """Heavy ball as in ``torch.optim.SGD``: the first update starts the buffer undampened."""
    momentum = group["momentum"]
    begun: list[tuple[torch.Tensor, torch.Tensor]] = []
    buffers = []
    for parameter, update in zip(params, updates, strict=True):
        state = states[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = like(parameter, update.clone())
        elif state["step"] == 1:  # it was made for a checkpoint to be loaded into, and nothing was
            local(state["momentum_buffer"]).copy_(update)
        else:
            begun.append((local(state["momentum_buffer"]), update))
        buffers.append(local(state["momentum_buffer"]))
    if begun:
        old = [buffer for buffer, _ in begun]
        if guard is None:
            torch._foreach_mul_(old, momentum)
        else:
            guard.decay_(old, momentum)
        torch._foreach_add_(old, [update for _, update in begun], alpha=1 - group["dampening"])
    if group["nesterov"]:
        found = list(torch._foreach_add(updates, buffers, alpha=momentum))
    elif guard is None:
        return buffers
    else:
        found = list(torch._foreach_mul(buffers, 1.0))  # copies
    if guard is not None:
        guard.clear_(found)
    return found
