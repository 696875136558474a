"""How much memory K-FAC takes beside parameters and gradients: the formula of Shampoo, and what layers add.

See :mod:`preconditioner_client.memory`, with blocks of layers' matrices in place of parameters' (an
embedding's has one side). Beside it, in bytes, for layers whose factors have the sides m, or one side m and
a diagonal of V:

==================  ==============================================================================
what                bytes
==================  ==============================================================================
``diagonals``       4 (V + 1) for every embedding, 4 (3 C + 1) for every BatchNorm of C channels, on
                    all ranks
``compared``        8 n² for every side of this rank's blocks with ``adaptive_refresh``: what it
                    compares with
``factor_buffers``  2 x replicas x c x the packed triangles n (n + 1) / 2 of the largest share of a
                    replica, and a scale for each, c the bytes of ``factor_dtype``; 0 for one replica
``recorded``        4 m² for every side of a whole layer, 4 V for an embedding's diagonal, 12 C for a
                    BatchNorm, on all ranks: factors from the backward pass to the step
``triangles``       for every different n of all replicas' blocks, where there is more than one
``temporaries``     what the largest moment of a backward pass or a step takes more than ``recorded``,
                    which is gone as soon as it is in the statistics; see :func:`_temporaries`
==================  ==============================================================================

Factors are sums over a batch, whose size is in none of these. It is in what hooks take for the moment: while
one runs over a layer, up to 8 bytes for every value of its inputs (of a convolution: of its patches) and of
its outputs. That is left out, as activations are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch

from preconditioner_client.distribution import Ranks, is_dtensor
from preconditioner_client.kfac.diagonals import DiagonalStatistics
from preconditioner_client.kfac.engine import LayerEngine
from preconditioner_client.kfac.layers import BatchNormLayer, Layer, Layers
from preconditioner_client.kfac.reduction import reduction_bytes
from preconditioner_client.memory import (
    MemoryEstimate,
    memory_of_blocks,
    packed_bytes,
    plan_on_meta,
    ranks_as_if,
    triangle_bytes,
)
from preconditioner_client.plan import GroupPlan, GroupSettings
from preconditioner_client.stack import BlockStack
from preconditioner_client.step_memory import (
    applying_bytes,
    deferred,
    directions_bytes,
    numbers_bytes,
    stack_bytes,
    working_copies,
)


def estimate_memory(
    groups: Sequence[dict[str, Any]],
    engine: LayerEngine,
    layers: Layers,
    diagonals: DiagonalStatistics,
    replicas: int | None,
    replica: int,
) -> MemoryEstimate:
    """The formula, for the parameter groups of a ``KFAC`` whose parameters all have gradients.

    Args:
        groups: as in ``param_groups``.
        engine: of the optimizer; its plans are not looked at.
        layers: of the model.
        diagonals: of the optimizer.
        replicas: see ``KFAC.estimate_memory``.
        replica: see ``KFAC.estimate_memory``.

    Raises:
        ValueError: see ``KFAC.estimate_memory``.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    if any(is_dtensor(parameter) for parameter in parameters):
        raise ValueError("K-FAC needs whole layers, and parameters are sharded (DTensor)")
    ranks = ranks_as_if(groups, engine.distributed, replicas, replica)
    settings = [engine.layer_settings(GroupSettings.of(group), group["params"]) for group in groups]
    shapes = [[engine.matrix_shape(parameter) for parameter in group["params"]] for group in groups]
    plans = plan_on_meta(settings, shapes, ranks)
    found = memory_of_blocks(groups, plans, ranks, engine.refresher.config, engine.credit_bytes)
    is_compared = any(of_group.similar_below is not None for of_group in settings)
    kept = [4 * prod(shape) for p in parameters for shape in diagonals.shapes(p).values()]
    return replace(
        found,
        # Every replica packs what it sends to each of the owners.
        triangles=triangle_bytes(n for plan in plans for block in plan.blocks for n in block.sides),
        diagonals=sum(kept),
        compared=2 * found.statistics if is_compared else 0,
        factor_buffers=reduction_bytes(plans, ranks, engine.factor_dtype),
        recorded=sum(map(_recorded, layers.all)),
        temporaries=_temporaries(groups, plans, ranks, layers, kept, is_compared),
    )


def _recorded(layer: Layer) -> int:
    """Bytes of what a layer's hook keeps of any number of batches."""
    if isinstance(layer, BatchNormLayer):
        return 12 * layer.weight.numel()
    rows, columns = layer.shape
    return 4 * (columns**2 + (rows if layer.is_embedding else rows**2))


def _temporaries(
    groups: Sequence[dict[str, Any]],
    plans: Sequence[GroupPlan],
    ranks: Ranks,
    layers: Layers,
    diagonals: Sequence[int],
    is_compared: bool,
) -> int:
    """The largest moment, beside what stays and what is under way, as far as it exceeds ``recorded``.

    While factors are there: in the backward pass those of a layer's second batch, if there is one before the
    step; in the step the averages of this rank's blocks, and copies of a stack, into whose statistics they
    go. When they are gone: while a stack is compared with earlier snapshots, copies of it; while directions
    are found, those, what is filtered, and the denominators; while layers are preconditioned, the
    directions, the matrices of all layers twice (what is preconditioned, and what comes of it), and copies
    of a stack; while updates are applied, their converted copies.
    """
    copies = working_copies(groups)
    stacks = [entry.stack for plan in plans for entry in plan.stacks]
    largest = max(diagonals, default=0)
    with_factors = max(
        max(map(_recorded, layers.matrices), default=0),
        copies + _accumulating(plans, ranks, stacks, diagonals),
    )
    comparing = max(map(_comparing, stacks), default=0) if is_compared else 0
    peak = copies + comparing
    filtered = updates = preconditioning = 0
    for group, plan in zip(groups, plans, strict=True):
        found = directions_bytes(group)
        filtered, updates = filtered + found.filtered, updates + found.updates
        peak = max(peak, copies + filtered + updates + found.weights + found.denominators)
        preconditioning = max(preconditioning, stack_bytes(group, plan)[1])
    # The inverses of diagonals, and the directions that they give, in the dtype of the gradients.
    inverting = max(4, *(p.element_size() for p in _parameters(groups))) * largest
    sharing = copies + filtered + updates + 2 * _joined(groups, layers) + max(preconditioning, inverting)
    peak = max(peak, sharing, copies + updates + applying_bytes(groups))
    if deferred(groups):
        # Snapshots that were begun before are still on their way to the host.
        peak += packed_bytes(n for stack in stacks for _ in stack.members for n in stack.sides)
    # A backend may hold what it summed for a while.
    summed = sum(diagonals) if ranks.replicas > 1 else 0
    recorded = sum(map(_recorded, layers.all))
    return max(with_factors, peak - recorded) + summed + numbers_bytes(plans)


def _parameters(groups: Sequence[dict[str, Any]]) -> Iterable[torch.Tensor]:
    return (parameter for group in groups for parameter in group["params"])


def _joined(groups: Sequence[dict[str, Any]], layers: Layers) -> int:
    """Bytes of the matrices of all layers, in the dtype of their gradients' working copies."""
    weights = set(_parameters(groups))
    return sum(
        max(4, layer.weight.element_size()) * prod(layer.shape)
        for layer in layers.matrices
        if layer.weight in weights
    )


def _accumulating(
    plans: Sequence[GroupPlan], ranks: Ranks, stacks: Sequence[BlockStack], diagonals: Sequence[int]
) -> int:
    """Most bytes beside what is recorded while it goes into statistics, first of blocks, then diagonals."""
    averages = sum(sum(_side_bytes(stack)) for stack in stacks)
    folding = max(map(_folding, stacks), default=0)
    reduced = sum(diagonals) if ranks.replicas > 1 else 0
    of_diagonals = sum(diagonals) + max(reduced, 3 * max(diagonals, default=0))
    return max(averages + max(folding, of_diagonals), _reducing(plans, ranks, averages))


def _folding(stack: BlockStack) -> int:
    """Side by side the new factors, their mean with the statistics, and the choice of either."""
    first, *second = _side_bytes(stack)
    return max(3 * first, *(max(2 * first + last, first + 3 * last) for last in second), 0)


def _comparing(stack: BlockStack) -> int:
    """Factors now, corrected, and their difference from those before, which are copies for scattered rows."""
    sides = _side_bytes(stack)
    return (1 if len(stack) < 3 else 3) * sum(sides) + max(sides)


def _reducing(plans: Sequence[GroupPlan], ranks: Ranks, averages: int) -> int:
    """Most bytes beside the buffers of a reduction: while they are filled, or read by this replica."""
    if ranks.replicas == 1:
        return 0
    peak = 0
    for plan in plans:
        for block in plan.blocks:
            for n in block.sides:
                square, packed = 4 * n * n, packed_bytes([n])
                peak = max(peak, square + 2 * packed)
                if block.replica == ranks.replica:
                    # The triangles of all replicas, their sum, and the whole matrix in the making.
                    reading = max(2 * ranks.replicas * packed, (ranks.replicas + 1) * packed + 3 * square)
                    peak = max(peak, averages - square + reading)
    return peak


def _side_bytes(stack: BlockStack) -> list[int]:
    """Of the statistics, side by side."""
    return [4 * len(stack) * n * n for n in stack.sides]
