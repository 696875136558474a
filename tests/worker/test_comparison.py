"""Arithmetic of crossings, ratios and medians."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from preconditioner_worker.comparison import Comparison, StepTime, compare, crossing, table, tuned
from preconditioner_worker.results import ResultError
from preconditioner_worker.tuning import committed


def test_crossing_is_the_first_evaluation_at_or_below_the_target(make_run):
    run = make_run("adamw", [3.0, 2.0, 1.0, 2.5])
    assert crossing(run, 2.0).step == 20
    assert crossing(run, 1.5).step == 30
    assert crossing(run, 0.5) is None


def test_ratios(make_run):
    comparison = compare(
        [make_run("adamw", [3.0, 2.5, 2.2, 2.0], seconds=0.5), make_run("shampoo", [2.6, 1.9], seconds=0.75)],
        "adamw",
    )
    assert comparison.target_loss == 2.0
    baseline, shampoo = comparison.rows
    assert (baseline.steps_to_target, baseline.steps_ratio, baseline.wall_ratio) == (40, 1, 1)
    assert (shampoo.steps_to_target, shampoo.seconds_to_target) == (20, 15.0)
    assert (shampoo.steps_ratio, shampoo.wall_ratio) == (0.5, 0.75)


def test_a_target_that_is_missed(make_run):
    comparison = compare([make_run("adamw", [3.0, 2.0]), make_run("sgd", [3.0, 2.9])], "adamw")
    row = comparison.row("sgd")
    assert row.steps_to_target is row.steps_ratio is row.wall_ratio is None


def test_a_baseline_that_dips_below_its_end_reached_it_then(make_run):
    assert compare([make_run("adamw", [3.0, 1.9, 2.0])], "adamw").rows[0].steps_to_target == 20


def test_seeds_are_paired_and_the_median_is_taken(make_run):
    runs = [make_run("adamw", [3.0, 2.0 + seed / 10], seed=seed) for seed in range(3)]
    runs += [make_run("shampoo", losses, seed=seed) for seed, losses in
             enumerate([[2.0, 1.0], [2.1, 1.0], [2.3, 2.3]])]  # fmt: skip
    row = compare(runs, "adamw").row("shampoo")
    assert (row.seeds, row.steps_ratio) == (3, 0.5)  # 0.5, 0.5, never


def test_a_diverged_rival_is_counted_and_a_diverged_baseline_refused(make_run):
    diverged = make_run("sgd", [3.0, math.nan])
    row = compare([make_run("adamw", [3.0, 2.0]), diverged], "adamw").row("sgd")
    assert (row.diverged, row.steps_ratio) == (1, None)
    with pytest.raises(ResultError, match="diverged with seed 0"):
        compare([diverged], "sgd")


def test_a_run_that_ends_above_its_first_batch_has_diverged(make_run):
    risen = make_run("sgd", [3.0, 9.5], first_loss=9.0)
    assert compare([make_run("adamw", [3.0, 2.0]), risen], "adamw").row("sgd").diverged == 1
    with pytest.raises(ResultError, match="diverged with seed 0"):
        compare([risen], "sgd")


def test_runs_of_different_code_are_not_compared(make_run):
    adamw, sgd = make_run("adamw", [3.0, 2.0]), make_run("sgd", [3.0, 2.0])
    assert compare([adamw, sgd], "adamw").environment == adamw.environment
    sgd.environment = sgd.environment.model_copy(update={"code": "0123456789abcdef"})
    with pytest.raises(
        ResultError, match=r"sgd-seed0 must not be compared .*code .* is not 0123456789abcdef"
    ):
        compare([adamw, sgd], "adamw")


def test_what_cannot_be_compared(make_run):
    with pytest.raises(ResultError, match="no run of the baseline"):
        compare([make_run("sgd", [1.0])], "adamw")
    with pytest.raises(ResultError, match="ran with seed 1"):
        compare([make_run("adamw", [1.0]), make_run("sgd", [1.0], seed=1)], "adamw")


def test_step_times(make_run):
    run = make_run("adamw", [1.0] * 10)
    run.steps.seconds[:] = [i / 1000 for i in range(1, 101)]
    time = StepTime.of([run])
    assert time.median == pytest.approx(50.5)
    assert time.p99 == pytest.approx(99.01)
    assert time.optimizer_median == pytest.approx(50.0)


def test_a_row_says_what_its_hyperparameters_rest_on(make_run):
    tuning = committed("text", "adamw")
    run = make_run("adamw", [3.0, 2.0])
    best = run.model_copy(update={"settings": run.settings.model_copy(update={"optimizer": tuning.best})})
    shampoo = make_run("shampoo", [3.0, 2.0])  # its default service is not the tuning's: no hyperparameter
    local = committed("text", "shampoo").best.model_copy(update={"service": "host:50051"})
    shampoo = shampoo.model_copy(
        update={"settings": shampoo.settings.model_copy(update={"optimizer": local})}
    )
    sgd = make_run("sgd", [3.0, 2.0])
    set_by_hand = sgd.settings.optimizer.model_copy(update={"lr": 0.7})
    kfac = make_run("kfac", [3.0, 2.0])
    comparison = compare([best, shampoo, kfac], "adamw")
    assert [row.tuned for row in comparison.rows] == ["12 trials", "12 trials", "default"]
    assert tuned(sgd.settings.model_copy(update={"optimizer": set_by_hand})) == "own"
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table(comparison))
    assert "12 trials" in console.export_text()


def test_a_comparison_without_it_is_read():
    path = (
        Path(__file__).parents[2] / "worker" / "results" / "compare" / "digits-batchnorm" / "comparison.json"
    )
    content = json.loads(path.read_text())
    for row in content["rows"]:
        del row["tuned"]
    del content["environment"]
    assert {row.tuned for row in Comparison.model_validate(content).rows} == {None}


def test_the_table_fits_a_narrow_terminal(make_run):
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table(compare([make_run("adamw", [3.0, 2.0]), make_run("sgd", [3.0, 2.9])], "adamw")))
    text = console.export_text()
    assert "never" in text
    assert "…" not in text
