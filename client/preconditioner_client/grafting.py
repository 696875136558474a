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
lars      none                                   eta ||w|| / (||m|| + lambda ||w||) (m + lambda w)
lamb      as rmsprop                             ||w|| / ||r|| r,  r = adam's d + lambda w
========  =====================================  ==========================================

LARS is that of arXiv 1708.03888 with its momentum left to the optimizer's, LAMB that of arXiv 1904.00962 with
phi the identity; norms are taken per parameter, the ratio is 1 where a norm is 0, and lambda is the group's
weight decay, which is then part of the direction and not applied a second time.

``none`` and ``sgd`` differ in what happens to a preconditioned block: ``none`` takes the preconditioned
gradient as it is, ``sgd`` gives it the length of m.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from preconditioner_client.config import Grafting, GraftingConfig
from preconditioner_client.foreach import copies, picked, positions_by_kind
from preconditioner_client.guard import Guard

Norms = Callable[[list[torch.Tensor]], list[torch.Tensor]]
"""From tensors to the Euclidean norms, 0-D, of the parameters that they belong to."""


def _own_norms(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Norms of the tensors as they are."""
    return list(torch._foreach_norm(tensors))


def needs_second_moment(config: GraftingConfig) -> bool:
    """Whether the method keeps a second moment per parameter."""
    return config.method in (Grafting.ADAGRAD, Grafting.RMSPROP, Grafting.ADAM, Grafting.LAMB)


def owns_weight_decay(config: GraftingConfig) -> bool:
    """Whether the method has weight decay within its direction."""
    return config.method in (Grafting.LARS, Grafting.LAMB)


def update_second_moments(
    config: GraftingConfig,
    moments: list[torch.Tensor],
    gradients: list[torch.Tensor],
    guard: Guard | None = None,
) -> None:
    """Advance v in place; ``moments`` and ``gradients`` correspond.

    With a ``guard``, the verdict on gradients that the host does not know, bad ones are zero already.
    """
    if config.method is Grafting.ADAGRAD:
        torch._foreach_addcmul_(moments, gradients, gradients)
    else:
        if guard is None:
            torch._foreach_mul_(moments, config.beta2)
        else:
            guard.decay_(moments, config.beta2)
        torch._foreach_addcmul_(moments, gradients, gradients, 1 - config.beta2)


def directions(
    config: GraftingConfig,
    filtered: Sequence[torch.Tensor],
    moments: list[torch.Tensor],
    steps: Sequence[int],
    weights: Sequence[torch.Tensor],
    weight_decay: float,
    norms: Norms = _own_norms,
) -> list[torch.Tensor]:
    """d of every parameter, in new tensors.

    Args:
        config: the method.
        filtered: m, any shapes.
        moments: v, as advanced by this step's gradients; empty if the method keeps none.
        steps: number t >= 1 of updates of each parameter, this one included.
        weights: w, in the dtype of m; read by ``lars`` and ``lamb`` only.
        weight_decay: lambda of ``lars`` and ``lamb``.
        norms: for ``lars`` and ``lamb``, where the tensors are only some rows of the parameters.
    """
    if config.method is Grafting.LARS:
        return _lars(config, filtered, weights, weight_decay, norms)
    if not needs_second_moment(config):
        return copies(filtered)
    denominators = list(torch._foreach_sqrt(moments))
    if config.method in (Grafting.ADAM, Grafting.LAMB):
        torch._foreach_div_(denominators, [(1 - config.beta2**t) ** 0.5 for t in steps])
    torch._foreach_add_(denominators, config.epsilon)
    result = list(torch._foreach_div(list(filtered), denominators))
    if config.method is Grafting.LAMB:
        torch._foreach_add_(result, list(weights), alpha=weight_decay)
        own = norms(result)
        torch._foreach_mul_(result, _ratios(norms(list(weights)), own))
    return result


def graft(
    config: GraftingConfig, blocks: torch.Tensor, diagonal: torch.Tensor, weights: torch.Tensor | None
) -> torch.Tensor:
    """Preconditioned blocks with the length of the directions that they replace; what is zero stays zero.

    Args:
        config: the method; ``none`` leaves the length.
        blocks: (b, d0 .. dk).
        diagonal: d of the same blocks.
        weights: (b,), how far each block has passed from ``diagonal`` to its preconditioned direction. None:
            all the way.
    """
    shape = (-1, *(1,) * (blocks.ndim - 1))
    if config.method is not Grafting.NONE:
        lengths = torch.linalg.vector_norm(diagonal.flatten(1), dim=1)
        own = torch.linalg.vector_norm(blocks.flatten(1), dim=1)
        # Zero after a pseudo-inverse of statistics that have seen nothing: no length makes a direction of it.
        scale = torch.nan_to_num(lengths / own, nan=0.0, posinf=0.0)
        blocks = blocks * scale.view(shape)
    return blocks if weights is None else torch.lerp(diagonal, blocks, weights.view(shape))


def _lars(
    config: GraftingConfig,
    filtered: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    weight_decay: float,
    norms: Norms,
) -> list[torch.Tensor]:
    weight_norms = norms(list(weights))
    denominators = list(torch._foreach_mul(weight_norms, weight_decay))
    torch._foreach_add_(denominators, norms(list(filtered)))
    ratios = _ratios(torch._foreach_mul(weight_norms, config.trust_coefficient), denominators)
    result = list(torch._foreach_add(list(filtered), list(weights), alpha=weight_decay))
    torch._foreach_mul_(result, ratios)
    return result


def _ratios(numerators: Sequence[torch.Tensor], denominators: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Elementwise quotients of scalars, 1 where either is 0."""
    found = list(numerators)
    for positions in positions_by_kind(numerators, denominators):
        a, b = (torch.stack(picked(scalars, positions)) for scalars in (numerators, denominators))
        ratios = torch.where((a > 0) & (b > 0), a / b, 1.0)
        for position, ratio in zip(positions, ratios.unbind(0), strict=True):
            found[position] = ratio
    return found
