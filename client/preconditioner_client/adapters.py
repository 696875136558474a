"""What joins the client to other libraries: metrics in their logs, state in their checkpoints.

Nothing of TensorBoard, Hugging Face or Lightning is imported before one of these functions asks for it.

==============================  =======================================================================
:func:`scalars`                 the metrics as a flat dict of floats, for any logger
:func:`log_to_tensorboard`      to a ``SummaryWriter``
:func:`hf_callback`             into the logs of a Hugging Face ``Trainer``; see :func:`report_first` too
:func:`lightning_callback`      to the loggers of a Lightning ``Trainer``
:func:`consolidate`             the state of all ranks on the one that saves; ``hf_callback`` calls it, too
==============================  =======================================================================
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, Protocol, runtime_checkable

import torch

from preconditioner_client.distribution import is_dtensor

PREFIX = "preconditioner/"
"""Before the name of every metric, so that they stand together and clash with none of the loop's own."""

# A timestamp, which no chart is for.
_NOT_LOGGED = frozenset({"epoch"})


@runtime_checkable
class MetricsSource(Protocol):
    """Anything with ``metrics()``: a ``Shampoo`` optimizer, or the handle that ``attach`` returns."""

    def metrics(self) -> dict[str, Any]:
        """See ``Shampoo.metrics``."""


def metrics_source(optimizer: Any) -> MetricsSource:
    """What has the metrics of an optimizer, which a framework may have wrapped.

    Args:
        optimizer: a ``Shampoo``, an optimizer that a preconditioner was attached to, or one of these inside
            wrappers that keep it as ``optimizer`` (as those of Accelerate and Lightning do).

    Raises:
        ValueError: there is no preconditioner in it.
    """
    found = optimizer
    while found is not None:
        attached = getattr(found, "_attached_preconditioner", None)
        if attached is not None:
            found = attached
        if isinstance(found, MetricsSource):
            return found
        found = getattr(found, "optimizer", None)
    raise ValueError(
        f"{type(optimizer).__name__} has no preconditioner: it is no Shampoo, and nothing was attached to it"
    )


def scalars(metrics: Mapping[str, Any], prefix: str = PREFIX) -> dict[str, float]:
    """Metrics as floats under prefixed names, as loggers want them.

    A list becomes its mean and its maximum (``ages`` gives ``ages_mean`` and ``ages_max``). What has no value
    yet is left out, and so is ``epoch``.
    """
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        if name in _NOT_LOGGED:
            continue
        if isinstance(value, (bool, int, float)):
            flat[prefix + name] = float(value)
        elif isinstance(value, (list, tuple)) and value:
            flat[f"{prefix}{name}_mean"] = float(sum(value) / len(value))
            flat[f"{prefix}{name}_max"] = float(max(value))
    return flat


def consolidate(optimizer: Any) -> None:
    """Collect the state of all ranks on rank 0, for a framework that saves the optimizer from there alone.

    Collective: all ranks call it just before the checkpoint is saved, as in
    ``accelerator.register_save_state_pre_hook(lambda *_: consolidate(optimizer))``. :func:`hf_callback` does
    it by itself. So does Lightning for Shampoo, and :func:`lightning_callback` for what was attached. With
    one process nothing changes.

    Args:
        optimizer: see :func:`metrics_source`.
    """
    source: Any = metrics_source(optimizer)
    source.consolidate_state_dict()


class ScalarWriter(Protocol):
    """The part of ``torch.utils.tensorboard.SummaryWriter`` that is used here."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        """Write one value."""


def log_to_tensorboard(writer: ScalarWriter, optimizer: Any, step: int, prefix: str = PREFIX) -> None:
    """Write the metrics of a step.

    Args:
        writer: a ``SummaryWriter`` of ``torch.utils.tensorboard`` or tensorboardX.
        optimizer: see :func:`metrics_source`.
        step: the loop's own count.
        prefix: before every name.
    """
    for tag, value in scalars(metrics_source(optimizer).metrics(), prefix).items():
        writer.add_scalar(tag, value, step)


class _HFMetrics:
    """The callback's methods, apart from its base class, which is known once transformers is imported."""

    def __init__(self, optimizer: Any, prefix: str) -> None:
        self._optimizer = optimizer
        self._prefix = prefix

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, Any] | None = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Add the metrics to a log of training; those of an evaluation and of the end are left alone."""
        if logs is None or "loss" not in logs:
            return
        source = metrics_source(optimizer if self._optimizer is None else self._optimizer)
        values = scalars(source.metrics(), self._prefix)
        logs.update(values)
        # The Trainer has put a copy into the history before it calls anybody.
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(values)

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Before a checkpoint, which rank 0 writes, bring the state of all ranks there."""
        chosen = optimizer if self._optimizer is None else self._optimizer
        if control.should_save and args.world_size > 1 and not _saved_in_parts(optimizer, chosen):
            consolidate(chosen)

    on_epoch_end = on_step_end

    def on_evaluate(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """With ``save_strategy="best"`` only what follows an evaluation decides whether it is saved."""
        if args.save_strategy == "best" and (self._optimizer or optimizer) is not None:
            saving = SimpleNamespace(should_save=True)
            self.on_step_end(args, state, saving, optimizer=optimizer)


def _saved_in_parts(prepared: Any, optimizer: Any) -> bool:
    """Whether the ``Trainer`` has every rank save its own part, by ``torch.distributed.checkpoint``.

    Args:
        prepared: the optimizer as Accelerate wrapped it, which knows how checkpoints are saved.
        optimizer: see :func:`metrics_source`.
    """
    plugin = getattr(getattr(prepared, "accelerator_state", None), "fsdp_plugin", None)
    kind = getattr(getattr(plugin, "state_dict_type", None), "name", None)
    return _is_sharded(optimizer) and kind != "FULL_STATE_DICT"


def _is_sharded(optimizer: Any) -> bool:
    """Whether ranks hold parts of its parameters."""
    return any(is_dtensor(parameter) for group in optimizer.param_groups for parameter in group["params"])


def hf_callback(optimizer: Any = None, prefix: str = PREFIX) -> Any:
    """A ``transformers.TrainerCallback`` that adds the metrics to every log of training.

    As in ``Trainer(..., callbacks=[hf_callback()])``: then the metrics are in ``state.log_history`` and in
    what is printed. The reporters (``report_to``) run before the callbacks of a user; for them hand the
    callback to :func:`report_first` instead.

    With several processes it also completes the checkpoints, see :func:`consolidate`, whichever
    ``save_strategy`` there is. Of a sharded model every rank saves its own part, but with FSDP's state dict
    type ``FULL_STATE_DICT``.

    Args:
        optimizer: see :func:`metrics_source`; default the Trainer's.
        prefix: before every name.
    """
    base = importlib.import_module("transformers").TrainerCallback
    return type("PreconditionerMetrics", (_HFMetrics, base), {})(optimizer, prefix)


def report_first(trainer: Any, callback: Any) -> None:
    """Add a callback to a Hugging Face ``Trainer`` before its reporters, so that they see what it logs."""
    trainer.add_callback(callback)
    callbacks = trainer.callback_handler.callbacks
    # The first decides whether this step is logged and saved, and stays the first.
    callbacks.insert(1, callbacks.pop())


class _LightningMetrics:
    """The callback's methods, apart from its base class, which is known once Lightning is imported."""

    def __init__(self, optimizer: Any, every_n_steps: int | None, prefix: str) -> None:
        self._optimizer = optimizer
        self._every = every_n_steps
        self._prefix = prefix
        self._logged = -1

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any, **__: Any) -> None:
        """Log after every so many steps of the optimizer."""
        step = int(trainer.global_step)
        # With accumulation several batches end at one step.
        if step == self._logged or step == 0 or step % (self._every or trainer.log_every_n_steps or 1):
            return
        self._logged = step
        chosen = trainer.optimizers if self._optimizer is None else [self._optimizer]
        values: dict[str, float] = {}
        for number, optimizer in enumerate(chosen):
            try:
                source = metrics_source(optimizer)
            except ValueError:
                if len(chosen) == 1:
                    raise
                continue
            values.update(scalars(source.metrics(), self._prefix + (f"{number}/" if len(chosen) > 1 else "")))
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Complete a checkpoint, which rank 0 writes, with what is attached to optimizers on other ranks."""
        if trainer.world_size == 1 or "optimizer_states" not in checkpoint:
            return
        for number, optimizer in enumerate(trainer.optimizers):
            # What is sharded the strategy saves by torch.distributed.checkpoint, by the names of parameters.
            if getattr(optimizer, "_attached_preconditioner", None) is None or _is_sharded(optimizer):
                continue
            consolidate(optimizer)
            if trainer.is_global_zero:
                checkpoint["optimizer_states"][number] = optimizer.state_dict()


def lightning_callback(optimizer: Any = None, every_n_steps: int | None = None, prefix: str = PREFIX) -> Any:
    """A Lightning ``Callback`` that sends the metrics to the loggers, and to ``trainer.callback_metrics``.

    With several processes it also completes the checkpoints of attached preconditioners, see
    :func:`consolidate`; but not of sharded models, whose checkpoints leave them out: save the handle that
    ``attach`` returned beside them.

    Serves ``lightning`` as well as ``pytorch_lightning``: the one that the program has imported.

    Args:
        optimizer: see :func:`metrics_source`; default all of the Trainer's that have a preconditioner, with
            their number before the name if there are several.
        every_n_steps: steps between two logs; default the Trainer's ``log_every_n_steps``.
        prefix: before every name.
    """
    both = ("lightning.pytorch", "pytorch_lightning")
    name = next((name for name in both if name in sys.modules), both[0])
    base = importlib.import_module(name).Callback
    return type("PreconditionerMetrics", (_LightningMetrics, base), {})(optimizer, every_n_steps, prefix)
