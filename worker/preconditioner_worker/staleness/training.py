"""One run of the study: every step the same, whatever the exchange, and nothing that reads a clock."""

from __future__ import annotations

import hashlib
import math
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from preconditioner_client import RootConfig, Shampoo
from preconditioner_client.roots import inverse_root
from preconditioner_worker.staleness.fingerprint import Fingerprint
from preconditioner_worker.staleness.optimizers import Service, build
from preconditioner_worker.staleness.results import Drift, StudyRun
from preconditioner_worker.staleness.specs import RunSpec, StudySettings
from preconditioner_worker.staleness.task import Task
from preconditioner_worker.staleness.tasks import TASKS
from preconditioner_worker.workloads.transformer import parameter_count

Report = Callable[[int], None]
"""Is told the number of steps made, now and then."""


def train(
    spec: RunSpec,
    settings: StudySettings,
    lr: float,
    *,
    service: Service | None = None,
    losses: list[float] | None = None,
    report: Report = lambda step: None,
) -> StudyRun:
    """Make one run, with one thread.

    Args:
        spec: which.
        settings: of the study.
        lr: peak learning rate.
        service: where an arm's roots come from; None: this process.
        losses: is appended every batch's loss.
        report: see :data:`Report`.
    """
    torch.set_num_threads(1)
    task = TASKS[settings.task].open()
    model = task.build_model(spec.seed)
    optimizer = build(spec, settings, lr, model, max_side=task.max_side, service=service)
    try:
        return _run(spec, settings, lr, task, model, optimizer, [] if losses is None else losses, report)
    finally:
        if isinstance(optimizer, Shampoo):
            optimizer.close()


def _run(
    spec: RunSpec,
    settings: StudySettings,
    lr: float,
    task: Task,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    losses: list[float],
    report: Report,
) -> StudyRun:
    began = time.monotonic()
    held_out = [task.held_out_loss(model)]
    train_loss: list[float] = []
    ages: Counter[int] = Counter()
    planned: bool | None = None if spec.arm is None else True
    drift: list[Drift] = []
    finite = True
    for step in range(1, settings.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = lr * settings.schedule.factor(step - 1, settings.steps)
        losses.append(_step(task, model, optimizer, spec.seed, step))
        finite = math.isfinite(losses[-1])
        age = _age(optimizer)
        if spec.arm is not None:
            ages.update([] if age is None else [age])
            planned = bool(planned and (not finite or age == spec.arm.age(step)))
            probed = finite and step % settings.drift_every == 0
            if probed and age is not None and isinstance(optimizer, Shampoo):
                drift.append(measure_drift(optimizer, step, age))
        if not finite or step % settings.evaluate_every == 0 or step == settings.steps:
            held_out.append(task.held_out_loss(model) if finite else math.nan)
            recent = losses[-settings.evaluate_every :]
            train_loss.append(math.fsum(recent) / len(recent) if finite else math.nan)
            finite = math.isfinite(held_out[-1])
            report(step)
        if not finite:
            break
    metrics: dict[str, Any] = optimizer.metrics() if isinstance(optimizer, Shampoo) else {}
    return StudyRun(
        spec=spec,
        lr=lr,
        fingerprint=Fingerprint.here(settings),
        steps=len(losses),
        loss_digest=loss_digest(losses),
        train_loss=train_loss,
        held_out_loss=held_out,
        diverged=not finite or held_out[-1] > held_out[0],
        ages=dict(sorted(ages.items())),
        ages_as_planned=planned,
        drift=drift,
        versions_adopted=metrics.get("versions_adopted", 0),
        refused=metrics.get("refused", 0),
        waits=metrics.get("waits", 0),
        parameters=parameter_count(model),
        blocks=metrics.get("blocks", 0),
        metric=task.metric,
        seconds=time.monotonic() - began,
    )


def _step(task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, step: int) -> float:
    """One step; the batch's loss, NaN where loss or gradient are not finite and no step is made."""
    optimizer.zero_grad()
    loss = task.loss(model, task.batch(seed, step - 1))
    torch.autograd.backward(loss)
    try:
        optimizer.step()
    except ValueError:
        # Shampoo refuses such a gradient; for a run that has diverged that is a result, not an error.
        if all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters()):
            raise
        return math.nan
    return loss.item()


def _age(optimizer: torch.optim.Optimizer) -> int | None:
    """Age of the oldest preconditioner that the last step used, as the optimizer logged it."""
    if not isinstance(optimizer, Shampoo):
        return None
    age: int | None = optimizer.metrics()["age"]
    return age


def measure_drift(optimizer: Shampoo, step: int, age: int) -> Drift:
    """Compare what is in use with the roots of the statistics of now, in float64.

    Args:
        optimizer: with a sum or a bias-corrected EMA of statistics.
        step: the latest.
        age: of the oldest preconditioner in use.
    """
    root: RootConfig = optimizer.param_groups[0]["root"]
    distances = []
    for statistics, stale, sides in _pairs(optimizer):
        fresh = inverse_root(statistics, root.root_order(sides), root.ridge)
        distances.append(float(torch.linalg.norm(stale - fresh) / torch.linalg.norm(fresh)))
    return Drift(step=step, age=age, median=float(np.median(distances)), largest=max(distances))


def _pairs(optimizer: Shampoo) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """For each side of each block: statistics (bias-corrected), preconditioner in use, number of sides."""
    config = optimizer.param_groups[0]["statistics"]
    for state in optimizer.state_dict()["state"].values():
        for key in [key for key in state if ".statistics." in key]:
            block, side = key.split(".statistics.")
            if state[f"{block}.version"] < 0:
                continue
            sides = sum(other.startswith(f"{block}.statistics.") for other in state)
            correction = 1.0
            if config.accumulation.value == "ema" and config.bias_correction:
                correction = 1 - config.beta ** state[f"{block}.updates"]
            yield state[key] / correction, state[f"{block}.preconditioner.{side}"], sides


def loss_digest(losses: list[float]) -> str:
    """Digest of losses, bit for bit: 16 hexadecimal digits."""
    return hashlib.sha256(struct.pack(f"<{len(losses)}d", *losses)).hexdigest()[:16]
