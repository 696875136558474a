"""What becomes of a closure that is given to ``step``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch


def refuse_under_grad_scaler() -> None:
    """Refuse a closure that goes through a ``GradScaler``.

    The scaler has unscaled the gradients and looked for infinities before the closure computes others. torch
    refuses ``scaler.step(optimizer, closure=closure)`` for that reason, but lets a closure pass that is given
    by position; and the optimizer is told of the scaler by nothing but the call stack.

    Raises:
        RuntimeError: ``GradScaler.step`` is what called the optimizer.
    """
    scaler_step = torch.amp.GradScaler.step.__code__
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is scaler_step:
            raise RuntimeError(
                "a closure cannot be used with GradScaler: it would compute new, scaled gradients after the "
                "scaler has unscaled and checked them. Call backward() before scaler.step(optimizer), "
                "without a closure"
            )
        if frame.f_back is None:
            return
        frame = frame.f_back


def evaluated(closure: Callable[[], Any]) -> Callable[[], Any]:
    """Evaluate a closure, with gradients, and stand in for it.

    Returns:
        A closure that gives the loss found, once; a second evaluation in the same step raises RuntimeError,
        since it would neither compute gradients anew nor see them as the first did.
    """
    with torch.enable_grad():
        losses = [closure()]

    def stand_in() -> Any:
        if not losses:
            raise RuntimeError(
                "this optimizer evaluates its closure more than once in a step, which an attached "
                "preconditioner does not allow: it has changed the gradients in between. Use Shampoo, or "
                "another optimizer"
            )
        return losses.pop()

    return stand_in
