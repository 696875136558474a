"""What a gradient must be before anything is done with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from preconditioner_client.grafting import owns_weight_decay


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


def working_gradients(group: dict[str, Any], names: Sequence[str]) -> list[torch.Tensor | None]:
    """Gradients of a group in the dtype of the arithmetic, with sign and coupled weight decay applied.

    Half precision becomes float32. Parameters without a gradient give None.

    Raises:
        RuntimeError: a sparse gradient.
    """
    coupled = 0.0
    if not group["decoupled_weight_decay"] and not owns_weight_decay(group["grafting"]):
        coupled = group["weight_decay"]
    gradients: list[torch.Tensor | None] = []
    for parameter, name in zip(group["params"], names, strict=True):
        gradient = parameter.grad
        if gradient is None or gradient.numel() == 0:
            gradients.append(None)
            continue
        if gradient.is_sparse:
            raise RuntimeError(
                f"the gradient of {name} is sparse, which Shampoo cannot precondition: use sparse=False in "
                f"its embedding, or put it into torch.optim.SparseAdam"
            )
        if gradient.dtype in (torch.float16, torch.bfloat16):
            gradient = gradient.to(torch.float32)
        if group["maximize"]:
            gradient = -gradient
        if coupled:
            gradient = gradient.add(parameter.to(gradient.dtype), alpha=coupled)
        gradients.append(gradient)
    return gradients


def check_finite(gradients: Sequence[Sequence[torch.Tensor | None]], names: Sequence[Sequence[str]]) -> None:
    """Refuse NaN and infinity before they reach statistics, moments or weights.

    Raises:
        ValueError: naming the first parameter concerned.
    """
    present = [g for of_group in gradients for g in of_group if g is not None]
    # The maximum norm, since a sum of squares may overflow for finite gradients.
    norms = torch._foreach_norm(present, ord=float("inf"))
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for norm in norms:
        by_device.setdefault(norm.device, []).append(norm.to(torch.float32))
    if all(bool(torch.stack(of_device).isfinite().all()) for of_device in by_device.values()):
        return
    for of_group, group_names in zip(gradients, names, strict=True):
        for gradient, name in zip(of_group, group_names, strict=True):
            if gradient is not None and not bool(gradient.isfinite().all()):
                bad = int((~gradient.isfinite()).sum())
                raise ValueError(
                    f"the gradient of {name} holds {bad} NaN or infinite values; nothing was updated. Skip "
                    f"the step, clip, or scale the loss (torch.amp.GradScaler)"
                )
