"""Kronecker factors of one batch, from a layer's inputs and the gradients of its outputs.

With inputs a (with an extra 1 for the bias) and gradients g of one example's loss by the layer's outputs:

=============  =====================================  ===============================================
layer          ``A``                                  ``G``
=============  =====================================  ===============================================
linear         ``E[a aᵀ]``                            ``E[g gᵀ]`` (arXiv 1503.05671, section 3)
convolution    ``E[sum over places of a aᵀ]``,        ``E[mean over places of g gᵀ]`` (KFC, arXiv 1602.01407,
               a the patches                          theorem 1)
embedding      its diagonal: how often each index     ``E[g gᵀ]``
               comes, as a is one-hot
=============  =====================================  ===============================================

The expectation is over the examples of the batch, and g is that of the training loss, so this is the
empirical Fisher (as in arXiv 1811.12019). All leading dimensions of a linear layer or an embedding count as
examples: tokens of a sequence are examples each, as they are for a loss that is the mean over tokens.

Backward gives gradients of the batch's *mean* loss, hence ``g = N dL/dy`` for N examples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class Factors:
    """Sums over batches of what is averaged in the end.

    Attributes:
        examples: N, summed.
        output: N ``G``, (out, out), summed.
        input: N ``A``, (in, in), summed; for an embedding its diagonal (V,).
    """

    examples: float
    output: torch.Tensor
    input: torch.Tensor

    def add_(self, other: Factors) -> Factors:
        """The sum over the batches of both, in the memory of this one."""
        output, inputs = self.output.add_(other.output), self.input.add_(other.input)
        return Factors(self.examples + other.examples, output, inputs)


def linear_factors(inputs: torch.Tensor, gradients: torch.Tensor, bias: bool) -> Factors:
    """Factors of ``y = W a``.

    Args:
        inputs: (.., in).
        gradients: of the mean loss by the outputs, (.., out).
        bias: whether a has an extra 1 at its end.
    """
    a = _flat(inputs)
    g = _flat(gradients)
    examples = a.shape[0]
    if bias:
        a = F.pad(a, (0, 1), value=1.0)
    # N G = N sum (N dy)(N dy)ᵀ / N
    return Factors(examples, (g.mT @ g).mul_(float(examples) ** 2), a.mT @ a)


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvolutionShape:
    """What patches are made with.

    Attributes:
        kernel: (h, w).
        stride: (h, w).
        dilation: (h, w).
        padding: as for ``F.pad``: left, right, top, bottom.
        mode: of the padding, as for ``F.pad``.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, int, int, int]
    mode: str = "constant"


def patches(inputs: torch.Tensor, shape: ConvolutionShape) -> torch.Tensor:
    """What each output place of a convolution sees: (N, c, h, w) as (N, places, c kh kw)."""
    padded = F.pad(inputs, shape.padding, mode=shape.mode) if any(shape.padding) else inputs
    unfolded = F.unfold(padded, shape.kernel, dilation=shape.dilation, stride=shape.stride)
    return unfolded.mT


def convolution_factors(
    inputs: torch.Tensor, gradients: torch.Tensor, bias: bool, shape: ConvolutionShape
) -> Factors:
    """Factors of a convolution, by the KFC approximation.

    Args:
        inputs: (N, c, h, w).
        gradients: of the mean loss by the outputs, (N, out, h', w').
        bias: whether every patch has an extra 1 at its end.
        shape: of the kernel and its steps.
    """
    examples = inputs.shape[0]
    a = patches(inputs.to(torch.float32), shape).flatten(0, 1)  # (N places, c kh kw)
    g = gradients.to(torch.float32).flatten(2).mT.flatten(0, 1)  # (N places, out)
    if bias:
        a = F.pad(a, (0, 1), value=1.0)
    places = math.prod(gradients.shape[2:])
    return Factors(examples, (g.mT @ g).mul_(float(examples) ** 2 / places), a.mT @ a)


def embedding_factors(indices: torch.Tensor, gradients: torch.Tensor, rows: int) -> Factors:
    """Factors of a look-up.

    Args:
        indices: any shape.
        gradients: of the mean loss by the outputs, (*indices.shape, width).
        rows: V, of the table.
    """
    g = _flat(gradients)
    flat = indices.reshape(-1)
    counts = g.new_zeros(rows).index_add_(0, flat, torch.ones_like(flat, dtype=g.dtype))
    examples = g.shape[0]
    return Factors(examples, (g.mT @ g).mul_(float(examples) ** 2), counts)


def normalised(
    inputs: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor, epsilon: float
) -> torch.Tensor:
    """What BatchNorm scales: ``(x - mean) / sqrt(variance + epsilon)``, per channel (dimension 1)."""
    places = (1, -1) + (1,) * (inputs.ndim - 2)
    return (inputs - mean.view(places)) * (variance + epsilon).rsqrt().view(places)


def batch_norm_fisher(scaled: torch.Tensor, gradients: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Fisher of a BatchNorm's scale and shift, per channel (SP-NGD, arXiv 2002.06015).

    Args:
        scaled: what the scale multiplies, (N, C, ..).
        gradients: of the mean loss by the outputs, (N, C, ..).

    Returns:
        N, and N times ``E[s s]``, ``E[s b]`` and ``E[b b]``, (3, C), for the gradients s and b of one
        example's loss by scale and shift.
    """
    examples = gradients.shape[0]
    g = gradients.to(torch.float32).reshape(*gradients.shape[:2], math.prod(gradients.shape[2:]))
    by_scale = (g * scaled.to(torch.float32).reshape(g.shape)).sum(-1)  # (N, C)
    by_shift = g.sum(-1)
    products = (by_scale * by_scale, by_scale * by_shift, by_shift * by_shift)
    return examples, torch.stack([p.sum(0) for p in products]) * float(examples) ** 2


def unit_wise_direction(
    fisher: torch.Tensor, gradients: Sequence[torch.Tensor], damping: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(F_c + damping I)^-1`` of a channel's 2 x 2 Fisher, in closed form (SP-NGD, arXiv 2002.06015).

    Args:
        fisher: ``E[s s]``, ``E[s b]``, ``E[b b]``: (3, C).
        gradients: by scale and shift, (C,) each.
        damping: > 0.
    """
    s, b = gradients
    scale, cross, shift = (row.to(s.dtype) for row in fisher)
    scale, shift = scale + damping, shift + damping
    determinant = scale * shift - cross * cross
    return (shift * s - cross * b) / determinant, (scale * b - cross * s) / determinant


def diagonal_direction(
    fisher: torch.Tensor, gradients: Sequence[torch.Tensor], damping: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`unit_wise_direction`, of the diagonal alone (arXiv 1811.12019)."""
    s, b = gradients
    return s / (fisher[0].to(s.dtype) + damping), b / (fisher[2].to(b.dtype) + damping)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """(.., n) as (examples, n) in float32."""
    return tensor.to(torch.float32).reshape(-1, tensor.shape[-1])
