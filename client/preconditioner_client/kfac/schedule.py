"""Schedules of large-batch K-FAC (arXiv 1811.12019, section 5): learning rate, momentum, scale of weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


def polynomial_decay(lr: float, epoch: float, *, begin: float, end: float, power: float) -> float:
    """``lr (1 - (e - begin) / (end - begin))^power``, held at ``lr`` before and at 0 after.

    Args:
        lr: at the beginning.
        epoch: e; it may be a fraction, or count steps.
        begin: of the decay.
        end: of the decay, > ``begin``.
        power: p > 0.

    Raises:
        ValueError: ``end`` is not after ``begin``, or ``power`` not > 0.
    """
    if not end > begin:
        raise ValueError(f"end must be after begin, not {end} after {begin}")
    if not power > 0:
        raise ValueError(f"power must be > 0, not {power}")
    done = min(max((epoch - begin) / (end - begin), 0.0), 1.0)
    return float(lr * (1 - done) ** power)


def scaled_momentum(momentum: float, lr: float, last_lr: float) -> float:
    """``m lr(t) / lr(t - 1)``, so that old updates do not outweigh the smaller new ones; 0 without an lr."""
    return momentum * lr / last_lr if last_lr > 0 else 0.0


class PolynomialDecay(LRScheduler):
    """Sets the learning rate of every group by :func:`polynomial_decay`, and its momentum in proportion.

    Args:
        optimizer: any with ``momentum`` in its groups.
        begin: count of :meth:`step` at which the decay begins.
        end: count at which it ends.
        power: p; 4 and above in the article's settings.
        scale_momentum: by :func:`scaled_momentum`; else it stays.

    Raises:
        ValueError: see :func:`polynomial_decay`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        begin: float = 0,
        end: float,
        power: float = 4.0,
        scale_momentum: bool = True,
    ) -> None:
        polynomial_decay(1.0, 0, begin=begin, end=end, power=power)
        self._begin, self._end, self._power = begin, end, power
        self._scale_momentum = scale_momentum
        super().__init__(optimizer)

    def get_lr(self) -> list[float | torch.Tensor]:
        """The learning rate of each group; the momentum is set beside it."""
        rates: list[float | torch.Tensor] = []
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            rate = polynomial_decay(
                float(base), self.last_epoch, begin=self._begin, end=self._end, power=self._power
            )
            if self._scale_momentum and group.get("momentum"):
                group["momentum"] = scaled_momentum(group["momentum"], rate, float(group["lr"]))
            rates.append(rate)
        return rates


@torch.no_grad()
def rescale_weights(weights: Iterable[torch.Tensor], epsilon: float = 1e-9) -> None:
    """``w <- w sqrt(2 d_out) / (||w|| + epsilon)``, in place, to be called after a step.

    For weights that are followed by a normalisation, whose scale has no effect but on their learning rate.

    Args:
        weights: (d_out, ..) each.
        epsilon: against a norm of 0.
    """
    for weight in weights:
        weight.mul_((2 * weight.shape[0]) ** 0.5 / (weight.norm() + epsilon))
