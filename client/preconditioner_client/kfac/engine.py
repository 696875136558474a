"""The engine of K-FAC: layers as matrices, their factors as statistics, BatchNorm in closed form.

To the engine below, the matrix of a layer stands at the place of its weight among the parameters. Its bias
and every parameter of no layer have no block there, and take the diagonal step; a bias gets its column of the
layer's matrix afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from preconditioner_client.averaging import Averaging
from preconditioner_client.config import GraftingConfig, StalenessConfig
from preconditioner_client.distribution import DistributedConfig, is_dtensor
from preconditioner_client.engine import Engine, MaybeTensors
from preconditioner_client.exchange import Exchange
from preconditioner_client.guard import Guard
from preconditioner_client.kfac.adaptive_refresh import AdaptiveRefresh, Intervals
from preconditioner_client.kfac.diagonals import DiagonalStatistics
from preconditioner_client.kfac.factor_stack import (
    EMBEDDING,
    MATRIX,
    PLAIN,
    FactorStack,
    LayerSettings,
    sides_of,
)
from preconditioner_client.kfac.layers import Layers, MatrixLayer
from preconditioner_client.kfac.recording import GradScale, Recorder
from preconditioner_client.kfac.reduction import FactorReduction, Key, Weighted
from preconditioner_client.plan import GroupPlan, GroupSettings
from preconditioner_client.schedule import Mask
from preconditioner_client.service_config import ServiceConfig

Direction = Callable[[torch.Tensor, Sequence[torch.Tensor], float], tuple[torch.Tensor, torch.Tensor]]
"""From the Fisher of a BatchNorm, gradients by scale and shift, and damping to a direction for both."""


class LayerEngine(Engine):
    """Preconditions the gradients of layers.

    Args:
        layers: of the model; they get hooks.
        grad_scale: see :class:`Recorder`.
        diagonals: statistics of embeddings' inputs and of BatchNorm.
        damping: lambda.
        batch_norm: direction of a BatchNorm; None: that of its gradient.
        factor_dtype: in which replicas send each other factors.
        adaptive: intervals between snapshots; None: constant.
        staleness: see :class:`Engine`, as for the rest.

    Attributes:
        factor_dtype: as given.
    """

    def __init__(
        self,
        layers: Layers,
        grad_scale: GradScale | None,
        diagonals: DiagonalStatistics,
        damping: float,
        batch_norm: Direction | None,
        factor_dtype: torch.dtype,
        adaptive: AdaptiveRefresh | None,
        staleness: StalenessConfig,
        service: str | ServiceConfig | Exchange | None,
        job: str | None,
        distributed: str | DistributedConfig,
    ) -> None:
        super().__init__(staleness, service, job, distributed)
        # Not before, since that may raise, and nobody would take the hooks out again.
        self._recorder = Recorder(layers, grad_scale)
        self._diagonals = diagonals
        self._damping = damping
        self._batch_norm = batch_norm
        self.factor_dtype = factor_dtype
        self._adaptive = adaptive
        self._intervals = Intervals(staleness.interval, staleness.max_staleness // 2)
        self._by_weight: dict[torch.Tensor, MatrixLayer] = {layer.weight: layer for layer in layers.matrices}
        self._placeholders: dict[torch.Tensor, torch.Tensor] = {}
        self._groups: list[list[torch.Tensor]] = []
        self._place: dict[torch.Tensor, tuple[int, int]] = {}
        self._filtered: dict[int, list[torch.Tensor | None]] = {}
        self._grafting: dict[int, GraftingConfig] = {}
        self._reduction: FactorReduction | None = None
        self._factor_bytes = 0
        self._recorder.due = self._is_due

    def add_group(
        self,
        settings: GroupSettings,
        parameters: Sequence[torch.Tensor],
        names: Sequence[str],
        compared: Sequence[torch.Tensor] | None = None,
        update: Callable[[], str] = str,
    ) -> None:
        """See :meth:`Engine.add_group`; what is given are the parameters themselves.

        Raises:
            ValueError: a parameter is sharded.
        """
        for parameter, name in zip(parameters, names, strict=True):
            if is_dtensor(parameter):
                raise ValueError(
                    f"{name} is sharded (DTensor): K-FAC needs whole layers; train it under "
                    f"DistributedDataParallel, or with Shampoo"
                )
        of_layers = self.layer_settings(settings, parameters)
        number = len(self._groups)
        super().add_group(of_layers, [self._placeholder(p) for p in parameters], names, parameters, update)
        self._groups.append(list(parameters))
        self._place.update({p: (number, index) for index, p in enumerate(parameters)})
        self._reduction = None
        self._intervals.extend(self.refresher.versions.size)

    def layer_settings(self, settings: GroupSettings, parameters: Sequence[torch.Tensor]) -> LayerSettings:
        """What the layers of a group with these parameters are cut with."""
        layers = [self._by_weight.get(parameter) for parameter in parameters]
        return LayerSettings(
            blocking=settings.blocking,
            statistics=settings.statistics,
            root=settings.root,
            kinds=tuple(
                PLAIN if layer is None else EMBEDDING if layer.is_embedding else MATRIX for layer in layers
            ),
            similar_below=None if self._adaptive is None else self._adaptive.similar_below,
        )

    def matrix_shape(self, parameter: torch.Tensor) -> tuple[int, ...]:
        """Of a layer's matrix for its weight; of any other parameter its own shape."""
        layer = self._by_weight.get(parameter)
        return tuple(parameter.shape) if layer is None else layer.shape

    def forget_moved(self, groups: Sequence[Sequence[torch.Tensor]]) -> bool:
        """See :meth:`Engine.forget_moved`; what is given are the parameters themselves."""
        moved = super().forget_moved([[self._placeholder(p) for p in of_group] for of_group in groups])
        if moved:
            self._groups.clear()
            self._place.clear()
        return moved

    def advance(self, gradients: Sequence[MaybeTensors], guard: Guard | None = None) -> Mask:
        """See :meth:`Engine.advance`; what is given are the gradients of the parameters themselves."""
        # The engine below asks only which are there, as the statistics come from the layers.
        self._filtered.clear()  # of a step that was broken off
        self._grafting.clear()
        usable = super().advance(gradients, guard)
        self._adapt()
        return usable

    def precondition(
        self,
        plan: GroupPlan,
        filtered: MaybeTensors,
        updates: MaybeTensors,
        grafting: GraftingConfig,
        usable: Mask,
        averaging: Averaging | None = None,
    ) -> None:
        """See :meth:`Engine.precondition`; nothing is averaged before it is grafted.

        A layer may be in two groups, so :meth:`share` does it for all.
        """
        number = next(i for i, known in enumerate(self.plans) if known is plan)
        self._filtered[number], self._grafting[number] = list(filtered), grafting

    def share(self, updates: Sequence[MaybeTensors]) -> None:
        """Precondition all layers, and take every block's direction from its owner."""
        filtered = [self._filtered.get(number, of_group) for number, of_group in enumerate(updates)]
        sources = self._joined(filtered)
        joined = self._joined(updates)
        for number, plan in enumerate(self.plans):
            if number in self._filtered:
                self._scale_embeddings(number, plan, sources[number])
                super().precondition(
                    plan, sources[number], joined[number], self._grafting[number], self._usable
                )
        super().share(joined)
        for weight, layer in self._by_weight.items():
            if weight not in self._place:
                continue
            number, index = self._place[weight]
            matrix, direction = joined[number][index], updates[number][index]
            if matrix is not None and direction is not None:
                layer.split(matrix, direction, self._of(updates, layer.bias))
        if self._batch_norm is not None:
            self._precondition_batch_norms(self._batch_norm, filtered, updates)
        # Else gradients would live through the next backward pass, beside those that it makes.
        self._filtered.clear()

    def metrics(self) -> dict[str, Any]:
        """As those of Shampoo, and ``layers`` and ``factor_bytes_sent``, see ``KFAC.metrics``."""
        return {
            **super().metrics(),
            "layers": len(self._recorder.layers.all),
            "factor_bytes_sent": self._factor_bytes,
        }

    def close(self) -> None:
        """Take the hooks out of the model, and end the exchange. Idempotent."""
        self._recorder.remove()
        super().close()

    def _accumulate(self, gradients: Sequence[MaybeTensors], guard: Guard | None) -> None:
        """Fold the factors of the step's batches into the statistics of their owners."""
        due = [self.step % plan.settings.statistics.every == 0 for plan in self.plans]
        found, lacking = self._batch_factors(gradients, due)
        averaged: Mapping[Key, Sequence[torch.Tensor]]
        if any(due) and self.ranks.replicas > 1 and any(plan.blocks for plan in self.plans):
            reduction = self._reducing()
            self._factor_bytes += reduction.bytes_per_step
            averaged = reduction.reduce(found, lacking)
        else:
            averaged = {key: [side / n for side in sides] for key, (n, sides) in found.items()}
        for number, plan in enumerate(self.plans):
            if due[number]:
                self._fold(number, plan, averaged, guard)
        self._diagonals.fold(
            [layer for layer in self._recorder.layers.all if self._is_counted(layer.weight, due)],
            {p: self.plans[number].settings.statistics for p, (number, _) in self._place.items()},
            self.ranks,
            guard,
        )
        self._recorder.layers.forget_batches()
        self._recorder.report_missed(self._place)

    def _batch_factors(
        self, gradients: Sequence[MaybeTensors], due: Sequence[bool]
    ) -> tuple[dict[Key, Weighted], set[Key]]:
        """What this rank's batches bring for each block, whoever owns it; and of which others may have some.

        A rank that did not use a layer, or had an empty batch for it, has a gradient of the others' batches,
        and only they know if hooks recorded those. On an accelerator the host waits to hear it, but only
        then; ``DistributedDataParallel`` waits in the same steps, to find parameters that were not used.
        """
        found: dict[Key, Weighted] = {}
        lacking: set[Key] = set()
        for number, plan in enumerate(self.plans):
            if not due[number]:
                continue
            for position, block in enumerate(plan.blocks):
                index = block.member.parameter
                if gradients[number][index] is None:
                    continue
                layer = self._by_weight[self._groups[number][index]]
                if layer.factors is not None and layer.factors.examples:
                    sides = sides_of(block.member.place, layer.factors.output, layer.factors.input)
                    found[number, position] = (layer.factors.examples, sides)
                elif not self._recorder.is_passed_by(layer):
                    lacking.add((number, position))
        return found, lacking

    def _fold(
        self,
        number: int,
        plan: GroupPlan,
        averaged: Mapping[Key, Sequence[torch.Tensor]],
        guard: Guard | None,
    ) -> None:
        first = plan.stacks[0].first if plan.stacks else 0
        for entry in plan.stacks:
            assert isinstance(entry.stack, FactorStack)
            positions = {row: plan.own[entry.first - first + row] for row in entry.every_row}
            rows = [row for row, position in positions.items() if (number, position) in averaged]
            if rows:
                entry.stack.fold(rows, [averaged[number, positions[row]] for row in rows], guard)

    def _adapt(self) -> None:
        """Set the intervals of blocks whose comparison is known by now."""
        for plan in self.plans:
            for entry in plan.stacks:
                assert isinstance(entry.stack, FactorStack)
                waiting = entry.stack.similarities
                while waiting and (waiting[0].ready is None or waiting[0].ready.query()):
                    seen = waiting.pop(0)
                    like_last, like_before = seen.verdicts.tolist()
                    for i, row in enumerate(seen.rows):
                        block = entry.first + row
                        self.refresher.intervals[block] = self._intervals.refreshed(
                            block, seen.known[i], like_last[i], like_before[i]
                        )

    def _scale_embeddings(self, number: int, plan: GroupPlan, sources: MaybeTensors) -> None:
        """Multiply the rows of this rank's embeddings by ``(A / pi + sqrt(l))^-1``."""
        for index, rows in enumerate(plan.rows):
            source = sources[index]
            if source is None or not rows:
                continue
            weight = self._groups[number][index]
            if not self._by_weight[weight].is_embedding:
                continue
            frequencies = self._diagonals.estimate(weight)
            if frequencies is None:
                continue
            for held in rows:
                stack = held.entry.stack
                assert isinstance(stack, FactorStack)
                pi = stack.pi([held.row])
                scale = 1 / (frequencies / pi + self._damping**0.5)
                stack.members[held.row].view(source).mul_(scale.unsqueeze(1).to(source.dtype))

    def _precondition_batch_norms(
        self, direction: Direction, filtered: Sequence[MaybeTensors], updates: Sequence[MaybeTensors]
    ) -> None:
        for layer in self._recorder.layers.batch_norms:
            fisher = self._diagonals.estimate(layer.weight)
            sources = [self._of(filtered, parameter) for parameter in layer.parameters]
            targets = [self._of(updates, parameter) for parameter in layer.parameters]
            found = [tensor for tensor in (*sources, *targets) if tensor is not None]
            if fisher is None or len(found) < 4:
                continue
            new = direction(fisher.view(3, -1), found[:2], self._damping)
            for target, values in zip(found[2:], new, strict=True):
                target.copy_(values)

    def _joined(self, tensors: Sequence[MaybeTensors]) -> list[list[torch.Tensor | None]]:
        """The matrices of layers at the places of their weights, as new tensors; all else as it is."""
        joined = [list(of_group) for of_group in tensors]
        for number, of_group in enumerate(self._groups):
            for index, parameter in enumerate(of_group):
                layer, tensor = self._by_weight.get(parameter), tensors[number][index]
                if layer is not None and tensor is not None:
                    joined[number][index] = layer.join(tensor, self._of(tensors, layer.bias))
        return joined

    def _of(self, tensors: Sequence[MaybeTensors], parameter: torch.Tensor | None) -> torch.Tensor | None:
        """The tensor of one parameter."""
        if parameter is None or parameter not in self._place:
            return None
        number, index = self._place[parameter]
        return tensors[number][index]

    def _placeholder(self, parameter: torch.Tensor) -> torch.Tensor:
        """What has a layer's shape and device, and takes no memory."""
        known = self._placeholders.get(parameter)
        if known is None or known.device != parameter.device:
            shape = self.matrix_shape(parameter)
            known = self._placeholders[parameter] = parameter.detach().new_zeros(()).expand(shape)
        return known

    def _reducing(self) -> FactorReduction:
        if self._reduction is None:
            device = self.parameters[0].device
            self._reduction = FactorReduction(self.plans, self.ranks, self.factor_dtype, device)
        return self._reduction

    def _is_due(self, weight: torch.Tensor) -> bool:
        """Whether the next step takes factors of the layer with this weight."""
        if weight not in self._place:
            return not self._groups
        every: int = self.plans[self._place[weight][0]].settings.statistics.every
        return (self.step + 1) % every == 0

    def _is_counted(self, weight: torch.Tensor, due: Sequence[bool]) -> bool:
        return weight in self._place and due[self._place[weight][0]]
