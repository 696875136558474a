"""The diagonal methods: what gives every step its length, and serves alone without a preconditioner.

With the filtered gradient m (the gradient g itself if ``beta1 = 0``), the direction d of each method is that
of ``torch.optim``:

========  =====================================  ==========================================
method    second moment v                        direction d
========  =====================================  ==========================================
none      none                                   m
sgd       none                                   m
adagrad   v <- v + g²                            m / (sqrt(v) + eps)
rmsprop   v <- beta2 v + (1 - beta2) g²          m / (sqrt(v) + eps)
adam      as rmsprop                             m / (sqrt(v / (1 - beta2^t)) + eps)
========  =====================================  ==========================================

``none`` and ``sgd`` differ in what happens to a preconditioned block: ``none`` takes the preconditioned
gradient as it is, ``sgd`` gives it the length of m.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from preconditioner_client.config import Grafting, GraftingConfig


def needs_second_moment(config: GraftingConfig) -> bool:
    """Whether the method keeps a second moment per parameter."""
    return config.method in (Grafting.ADAGRAD, Grafting.RMSPROP, Grafting.ADAM)


def update_second_moments(
    config: GraftingConfig, moments: list[torch.Tensor], gradients: list[torch.Tensor]
) -> None:
    """Advance v in place; ``moments`` and ``gradients`` correspond."""
    if config.method is Grafting.ADAGRAD:
        torch._foreach_addcmul_(moments, gradients, gradients)
    else:
        torch._foreach_mul_(moments, config.beta2)
        torch._foreach_addcmul_(moments, gradients, gradients, 1 - config.beta2)


def directions(
    config: GraftingConfig,
    filtered: Sequence[torch.Tensor],
    moments: list[torch.Tensor],
    steps: Sequence[int],
) -> list[torch.Tensor]:
    """d of every parameter, in new tensors.

    Args:
        config: the method.
        filtered: m, any shapes.
        moments: v, as advanced by this step's gradients; empty if the method keeps none.
        steps: number t >= 1 of updates of each parameter, this one included.
    """
    if not needs_second_moment(config):
        return [m.clone() for m in filtered]
    denominators = list(torch._foreach_sqrt(moments))
    if config.method is Grafting.ADAM:
        torch._foreach_div_(denominators, [(1 - config.beta2**t) ** 0.5 for t in steps])
    torch._foreach_add_(denominators, config.epsilon)
    return list(torch._foreach_div(list(filtered), denominators))
