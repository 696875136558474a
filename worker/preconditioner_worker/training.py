"""The training loop: the same for every workload and optimizer, and timed step by step."""

from __future__ import annotations

import logging
import math
import time
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from preconditioner_client import Attachment
from preconditioner_client.adapters import metrics_source
from preconditioner_client.preconditioned_optimizer import PreconditionedOptimizer
from preconditioner_worker.progress import display
from preconditioner_worker.results import (
    Environment,
    EvaluationPoint,
    RunResult,
    RunSettings,
    StepSeries,
)
from preconditioner_worker.rivals import CurveBall
from preconditioner_worker.workloads import Batch, Workload, text_digest
from preconditioner_worker.workloads.transformer import parameter_count

logger = logging.getLogger(__name__)


def train(workload: Workload, settings: RunSettings, *, console: Console | None = None) -> RunResult:
    """Train one model.

    A loss that is not finite ends the run and is recorded; it raises nothing.

    Args:
        workload: what to train; the one that ``settings.workload`` names.
        settings: how.
        console: where progress is shown; None: nowhere.
    """
    torch.set_num_threads(settings.threads)
    model = workload.build_model(settings.seed)
    optimizer = settings.optimizer.build(model)
    try:
        return _run(workload, settings, model, optimizer, console or Console(quiet=True))
    finally:
        if (preconditioner := _preconditioner(optimizer)) is not None:
            preconditioner.close()


def _run(
    workload: Workload,
    settings: RunSettings,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    console: Console,
) -> RunResult:
    schedule, total = settings.schedule, settings.steps
    preconditioner = _preconditioner(optimizer)
    scheduler = LambdaLR(optimizer, lambda step: schedule.factor(min(step, total - 1), total))
    series = StepSeries()
    evaluations: list[EvaluationPoint] = []
    elapsed, service_seconds, held_out, diverged = 0.0, 0.0, math.nan, False
    with display(settings.label, total, console) as shown:
        for step in range(1, total + 1):
            batch = workload.batch(settings.seed, step - 1)
            loss, seconds, optimizer_seconds = _step(workload, model, optimizer, batch)
            if step == 1:
                service_seconds = _await_service(preconditioner, settings.service_wait)
            elapsed += seconds
            scheduler.step()
            age, versions = _freshness(preconditioner)
            series.loss.append(loss)
            series.seconds.append(seconds)
            series.optimizer_seconds.append(optimizer_seconds)
            series.age.append(age)
            series.versions.append(versions)
            diverged = not math.isfinite(loss)
            if diverged or step % settings.evaluate_every == 0 or step == total:
                held_out, accuracy = workload.evaluate(model)
                evaluations.append(
                    EvaluationPoint(step=step, seconds=elapsed, loss=held_out, accuracy=accuracy)
                )
                diverged = diverged or not math.isfinite(held_out)
            shown.step(step, loss=loss, held_out=held_out, seconds=seconds, age=age, versions=versions)
            if diverged:
                break
    return RunResult(
        settings=settings,
        metric=workload.metric,
        parameters=parameter_count(model),
        steps=series,
        evaluations=evaluations,
        diverged=diverged,
        service_seconds=service_seconds,
        metrics={} if preconditioner is None else preconditioner.metrics(),
        environment=Environment.here(text_digest(workload)),
    )


def _step(
    workload: Workload, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch
) -> tuple[float, float, float]:
    """One step: the batch's loss, seconds in all, seconds in the optimizer.

    An optimizer that differentiates the model itself takes all. Where loss or gradient are not finite the
    optimizer makes no step, and the loss returned is NaN.
    """
    start = time.perf_counter()
    if isinstance(optimizer, CurveBall):
        loss = optimizer.step(batch.inputs, batch.targets, workload.criterion)
        seconds = time.perf_counter() - start
        return loss.item(), seconds, seconds
    optimizer.zero_grad()
    loss = workload.criterion(model(batch.inputs), batch.targets)
    torch.autograd.backward(loss)
    middle = time.perf_counter()
    try:
        optimizer.step()
    except ValueError:
        # Shampoo refuses such a gradient; for a run that has diverged that is a result, not an error.
        if all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters()):
            raise
        return math.nan, middle - start, 0.0
    end = time.perf_counter()
    return loss.item(), end - start, end - middle


def _preconditioner(optimizer: torch.optim.Optimizer) -> PreconditionedOptimizer | Attachment | None:
    """What preconditions in an optimizer: itself, or what is attached to it."""
    try:
        source = metrics_source(optimizer)
    except ValueError:
        return None
    assert isinstance(source, PreconditionedOptimizer | Attachment)
    return source


def _await_service(preconditioner: PreconditionedOptimizer | Attachment | None, longest: float) -> float:
    """Stand still until there is the service that the first step called for; returns the seconds."""
    if preconditioner is None:
        return 0.0
    start = time.monotonic()
    while not preconditioner.metrics()["connected"]:
        if time.monotonic() - start > longest:
            logger.warning("the preconditioner service is not there after %.0f s; going on without", longest)
            break
        time.sleep(0.05)
    return time.monotonic() - start


def _freshness(preconditioner: PreconditionedOptimizer | Attachment | None) -> tuple[int | None, int]:
    """Age in use and versions adopted; None and 0 without preconditioners."""
    if preconditioner is None:
        return None, 0
    metrics: dict[str, Any] = preconditioner.metrics()
    age = metrics["age"]
    return (None if age is None else int(age)), int(metrics["versions_adopted"])
