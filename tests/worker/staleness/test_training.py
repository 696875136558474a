"""Runs of the study: the same bits every time, divergence recorded, drift measured right."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from preconditioner_client import Grafting, GraftingConfig, LocalExchange, Shampoo, StatisticsConfig
from preconditioner_worker.staleness import Arm, ArmKind, RunSpec, StudySettings, train
from preconditioner_worker.staleness.optimizers import build
from preconditioner_worker.staleness.regression_task import RegressionTask
from preconditioner_worker.staleness.specs import CONTROLS, control
from preconditioner_worker.staleness.tasks import TASKS
from preconditioner_worker.staleness.training import measure_drift

SETTINGS = StudySettings(steps=45, evaluate_every=20, drift_every=7, blend_steps=4)
A10 = RunSpec(method="A", n=10, statistics="sum", grafting=True, seed=3)


def test_a_run_is_the_same_bit_for_bit() -> None:
    losses: list[float] = []
    again, here = train(A10, SETTINGS, 0.05), train(A10, SETTINGS, 0.05, losses=losses)
    assert again.model_copy(update={"seconds": here.seconds}) == here
    assert len(losses) == here.steps == 45
    assert len(here.held_out_loss) == 1 + 3
    assert here.final_loss < here.held_out_loss[0]
    assert here.ages_as_planned
    assert here.ages == {age: 45 // 20 + (age <= 15) for age in range(10, 20)}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_a_function_of_seeds_and_is_learned(task: str) -> None:
    settings = SETTINGS.model_copy(update={"task": task})
    run = train(A10, settings, 0.05)
    assert run.final_loss < run.held_out_loss[0]
    assert run.blocks == (4 if task == "text" else 3)
    assert run.loss_digest == train(A10, settings, 0.05).loss_digest


def test_the_regression_is_as_specified() -> None:
    task = RegressionTask(batch_size=20_000, held_out=20_000)
    inputs, targets = task.batch(0, 0)
    assert inputs.square().mean().item() == pytest.approx(1, rel=0.03)
    variances = torch.linalg.svdvals(inputs.double()).square() / len(inputs)
    expected = torch.arange(1, 33).double() ** -3
    assert torch.allclose(variances, 32 * expected / expected.sum(), rtol=0.06)
    # The input's first axis is no coordinate.
    assert inputs.square().mean(0).max() < 16
    student = task.build_model(0)
    with torch.no_grad():
        for linear, (weight, bias) in zip(student[::2], task._teacher, strict=True):
            for parameter, values in ((linear.weight, weight.T), (linear.bias, bias)):
                parameter.zero_()
                parameter[tuple(map(slice, values.shape))] = torch.from_numpy(values)
    # The teacher's own weights leave the noise in training, and nothing in an evaluation.
    assert task.held_out_loss(student) < 1e-10
    assert task.loss(student, (batch := task.batch(0, 1))).item() == pytest.approx(0.5 * 16 * 0.09, rel=0.03)
    assert not torch.equal(batch.inputs, inputs)
    assert torch.equal(task.batch(0, 0).targets, targets)


def test_another_seed_is_another_run() -> None:
    short = SETTINGS.model_copy(update={"steps": 3})
    other = A10.model_copy(update={"seed": 4})
    assert train(A10, short, 0.05).loss_digest != train(other, short, 0.05).loss_digest


@pytest.mark.parametrize("spec", [
    RunSpec(method="adamw", seed=0),
    RunSpec(method="A", n=1, statistics="sum", grafting=False, seed=0),
], ids=lambda spec: spec.method)  # fmt: skip
def test_divergence_is_recorded_and_ends_the_run(spec: RunSpec) -> None:
    run = train(spec, SETTINGS, 1e18)
    assert run.diverged
    assert run.final_loss == math.inf
    assert run.steps_to(1.0) == math.inf
    assert type(run).model_validate_json(run.model_dump_json()).spec == spec


def test_every_control_is_shampoo_but_for_what_its_name_says() -> None:
    versions = {}
    for method in CONTROLS:
        run = train(control(method, "sum", True, 0, largest_n=10), SETTINGS, 0.02)
        assert not run.diverged
        assert run.ages_as_planned is None
        versions[method] = run.versions_adopted / max(run.blocks, 1)
    assert versions == {"diagonal": 0, "frozen": 1, "random": 0, "late": 26, "adamw": 0, "adagrad": 0}


def test_the_optimizer_is_the_published_one() -> None:
    optimizer = build(A10, SETTINGS, 0.05, nn.Linear(4, 300, bias=False), max_side=128)
    assert isinstance(optimizer, Shampoo)
    (group,) = optimizer.param_groups
    assert group["grafting"].method is Grafting.ADAGRAD
    assert group["statistics"].accumulation.value == "sum"
    assert (group["beta1"], group["momentum"], group["dampening"]) == (0.0, 0.9, 0.9)
    # Exponents -1/4 per side of a matrix, -1/2 beside a vocabulary.
    assert (group["root"].root_order(2), group["root"].root_order(1)) == (4.0, 2.0)
    assert group["grafting"].blend_steps == SETTINGS.blend_steps


@pytest.mark.parametrize("accumulation", ["sum", "ema"])
def test_drift_is_the_distance_to_the_roots_of_now(accumulation: str) -> None:
    arm = Arm(ArmKind.PUBLISHED, 2)
    layer = nn.Linear(3, 3, bias=False)
    optimizer = Shampoo(
        layer.named_parameters(),
        lr=0.1,
        grafting=GraftingConfig(method="sgd"),
        statistics=StatisticsConfig(accumulation=accumulation, beta=0.9),
        staleness=arm.staleness(),
        service=LocalExchange(),
    )
    # A gradient that is the identity at every step: statistics t I, their EMA (corrected) I.
    for _ in range(5):
        layer.weight.grad = torch.eye(3)
        optimizer.step()
    drift = measure_drift(optimizer, 5, 3)
    expected = (2 / 5) ** -0.25 - 1 if accumulation == "sum" else 0.0  # snapshot of step 2 in step 5
    assert (drift.step, drift.age) == (5, 3)
    assert drift.median == pytest.approx(expected, abs=1e-6)
    assert drift.largest == pytest.approx(expected, abs=1e-6)
