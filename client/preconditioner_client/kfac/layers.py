"""The layers of a model that K-FAC knows: what each records, and its parameters as one matrix.

A layer with a bias is one matrix, ``[W, b]`` of shape (out, in + 1), as its inputs have an extra 1. Side 0 of
a matrix is that of ``G``, side 1 that of ``A``; of an embedding (V, width) side 0 is that of ``A``, a
diagonal, and side 1 that of ``G``.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import nn

from preconditioner_client.kfac.factors import (
    ConvolutionShape,
    Factors,
    batch_norm_fisher,
    convolution_factors,
    embedding_factors,
    linear_factors,
    normalised,
)

logger = logging.getLogger("preconditioner_client")

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(slots=True)
class MatrixLayer:
    """A linear layer, a convolution or an embedding.

    Attributes:
        name: of the module.
        module: itself.
        weight: its weight.
        bias: its bias, if it is trained.
        factors: of the batches since the last step.
    """

    name: str
    module: nn.Module
    weight: nn.Parameter
    bias: nn.Parameter | None = None
    factors: Factors | None = None

    @property
    def is_embedding(self) -> bool:
        """Whether ``A`` is a diagonal."""
        return isinstance(self.module, nn.Embedding)

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """Weight, and bias if there is one."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the layer's matrix."""
        rows = self.weight.shape[0]
        return rows, self.weight[0].numel() + (self.bias is not None)

    def join(self, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Tensors of the shapes of weight and bias as one new matrix; a bias that is None counts as 0."""
        flat = weight.flatten(1)
        if self.bias is None:
            return flat.clone(memory_format=torch.contiguous_format)
        column = weight.new_zeros(len(weight)) if bias is None else bias.to(weight.dtype)
        return torch.cat([flat, column.unsqueeze(1)], 1)

    def split(self, matrix: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """The inverse of :meth:`join`, into given tensors."""
        columns = matrix.shape[1] - (self.bias is not None)
        weight.copy_(matrix[:, :columns].reshape(weight.shape))
        if self.bias is not None and bias is not None:
            bias.copy_(matrix[:, columns])

    def record(self, inputs: torch.Tensor, gradients: torch.Tensor) -> None:
        """Take in one batch."""
        bias = self.bias is not None
        if isinstance(self.module, nn.Embedding):
            new = embedding_factors(inputs, gradients, self.module.num_embeddings)
        elif isinstance(self.module, nn.Linear):
            new = linear_factors(inputs, gradients, bias)
        else:
            flat = isinstance(self.module, nn.Conv1d)
            unbatched = inputs.ndim == (2 if flat else 3)
            inputs, gradients = (t.unsqueeze(0) if unbatched else t for t in (inputs, gradients))
            inputs, gradients = (t.unsqueeze(2) if flat else t for t in (inputs, gradients))
            new = convolution_factors(inputs, gradients, bias, convolution_shape(self.module))
        self.factors = new if self.factors is None else self.factors.add_(new)


@dataclass(slots=True)
class BatchNormLayer:
    """A BatchNorm with scale and shift.

    Attributes:
        name: of the module.
        module: itself.
        weight: the scale.
        bias: the shift.
        fisher: (3, C), and the number of examples, of the batches since the last step; see
            :func:`batch_norm_fisher`.
    """

    name: str
    module: nn.Module
    weight: nn.Parameter
    bias: nn.Parameter
    fisher: tuple[float, torch.Tensor] | None = None

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """Scale and shift."""
        return self.weight, self.bias

    def record(self, inputs: torch.Tensor, gradients: torch.Tensor) -> None:
        """Take in one batch."""
        module = self.module
        assert isinstance(module, _BATCH_NORMS)
        x = inputs.to(torch.float32)
        if module.training or module.running_mean is None or module.running_var is None:
            others = [dim for dim in range(x.ndim) if dim != 1]
            mean, variance = x.mean(others), x.var(others, unbiased=False)
        else:
            mean, variance = module.running_mean, module.running_var
        new = batch_norm_fisher(normalised(x, mean, variance, module.eps), gradients)
        if self.fisher is not None:
            new = new[0] + self.fisher[0], new[1] + self.fisher[1]
        self.fisher = new


Layer = MatrixLayer | BatchNormLayer


@dataclass(slots=True)
class Layers:
    """The layers of a model whose parameters are trained."""

    matrices: list[MatrixLayer] = field(default_factory=list)
    batch_norms: list[BatchNormLayer] = field(default_factory=list)

    @property
    def all(self) -> list[Layer]:
        """Of both kinds."""
        return [*self.matrices, *self.batch_norms]

    def forget_batches(self) -> None:
        """Drop what was recorded since the last step."""
        for matrix in self.matrices:
            matrix.factors = None
        for norm in self.batch_norms:
            norm.fisher = None


def find_layers(model: nn.Module) -> Layers:
    """The layers of a model that K-FAC knows.

    Linear, Conv1d, Conv2d (not in groups, not transposed), Embedding, and BatchNorm with scale and shift. A
    weight that several modules share is left out, since its gradient is a sum over all their uses.
    """
    found = Layers()
    modules = [(name or "model", module) for name, module in model.named_modules()]
    uses = Counter(id(p) for _, module in modules for p in module.parameters(recurse=False))
    for name, module in modules:
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if not isinstance(weight, nn.Parameter) or not weight.requires_grad:
            continue
        trained = bias if isinstance(bias, nn.Parameter) and bias.requires_grad else None
        is_norm = isinstance(module, _BATCH_NORMS)
        if not (is_norm or isinstance(module, (nn.Linear, nn.Embedding)) or _is_known_convolution(module)):
            continue
        if any(uses[id(p)] > 1 for p in (weight, bias) if p is not None):
            logger.info("%s shares its weight with another module and takes the gradient's step", name)
        elif not is_norm and weight.numel():
            found.matrices.append(MatrixLayer(name, module, weight, trained))
        elif is_norm and trained is not None:
            found.batch_norms.append(BatchNormLayer(name, module, weight, trained))
    return found


def convolution_shape(module: nn.Module) -> ConvolutionShape:
    """How the patches of a Conv1d or Conv2d lie; one dimension is the last of two."""
    assert isinstance(module, (nn.Conv1d, nn.Conv2d))
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    if isinstance(module.padding, str):
        total = [
            d * (k - 1) if module.padding == "same" else 0 for k, d in zip(kernel, dilation, strict=True)
        ]
        sides = [(n // 2, n - n // 2) for n in total]
    else:
        sides = [(n, n) for n in module.padding]
    top, left = sides if len(sides) == 2 else ((0, 0), sides[0])
    return ConvolutionShape(
        kernel=_pair(kernel),
        stride=_pair(stride),
        dilation=_pair(dilation),
        padding=(*left, *top),
        mode="constant" if module.padding_mode == "zeros" else module.padding_mode,
    )


def _pair(numbers: tuple[int, ...]) -> tuple[int, int]:
    return (numbers[0], numbers[1]) if len(numbers) == 2 else (1, numbers[0])


def _is_known_convolution(module: nn.Module) -> bool:
    return isinstance(module, (nn.Conv1d, nn.Conv2d)) and module.groups == 1
