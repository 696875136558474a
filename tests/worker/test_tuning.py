"""Grids: stages build on the best so far, trials are kept, committed tunings fit their grids."""

from __future__ import annotations

import shutil

import pytest

from preconditioner_worker import tuning as module
from preconditioner_worker.commands import Compare
from preconditioner_worker.contenders import CONTENDERS
from preconditioner_worker.experiments import horizon, settle
from preconditioner_worker.grids import COMPARED, GRIDS
from preconditioner_worker.optimizers import AdamWSettings, ShampooSettings
from preconditioner_worker.results import Environment, ResultError
from preconditioner_worker.tuning import (
    Grid,
    Trial,
    Tuning,
    combinations,
    committed,
    committed_path,
    load_tuning,
    tune,
)
from preconditioner_worker.workloads import DEFAULT_STEPS

GRID = Grid(
    workload="digits",
    start=AdamWSettings(lr=1e-3),
    steps=10,
    stages=[{"lr": [1e-3, 1e-2]}, {"beta2": [0.9, 0.99], "beta1": [0.9]}],
)


def test_combinations_are_all_of_them_around_the_best():
    found = list(combinations(AdamWSettings(lr=0.5), {"beta1": [0.8, 0.9], "beta2": [0.9, 0.99]}))
    assert [(s.lr, s.beta1, s.beta2) for s in found] == [
        (0.5, 0.8, 0.9), (0.5, 0.8, 0.99), (0.5, 0.9, 0.9), (0.5, 0.9, 0.99)
    ]  # fmt: skip


def test_a_grid_runs_goes_on_and_keeps_what_it_has(tmp_path, monkeypatch):
    path = tmp_path / "tune" / "digits-adamw.json"
    seen: list[Trial] = []
    done = tune(GRID, path, report=seen.append)
    # beta2 = 0.99 is the default, so one of the second stage was run by the first.
    tried = [(trial.settings.lr, trial.settings.beta2, trial.seed) for trial in done.trials]
    assert tried == [(1e-3, 0.99, 1), (1e-2, 0.99, 1), (1e-2, 0.9, 1)]
    assert seen == done.trials
    assert done.best.lr == 1e-2
    assert load_tuning(path) == done
    assert done.environment == Environment.here()

    monkeypatch.setattr(module, "_trial", None)
    seen.clear()
    assert tune(GRID, path, report=seen.append).trials == done.trials
    assert not seen  # nothing is run again
    with pytest.raises(ResultError, match="another grid"):
        tune(GRID.model_copy(update={"steps": 11}), path)


def test_trials_of_other_code_are_kept_apart(tmp_path, monkeypatch):
    path = tmp_path / "digits-adamw.json"
    here = Environment.here()
    trial = Trial(settings=AdamWSettings(lr=1e-3), seed=1, final_loss=3.0)
    monkeypatch.setattr(module, "_trial", None)  # nothing is run before it is refused
    other = here.model_copy(update={"code": "0123456789abcdef"})
    for environment, said in ((other, "code 0123456789abcdef is not"), (None, "nothing says by what code")):
        Tuning(grid=GRID, trials=[trial], environment=environment).save(path)
        before = path.read_bytes()
        with pytest.raises(ResultError, match=f"made otherwise .{said}"):
            tune(GRID, path)
        assert path.read_bytes() == before


def test_diverged_trials_never_win():
    tuning = Tuning(
        grid=GRID,
        trials=[
            Trial(settings=AdamWSettings(lr=1.0), seed=1, final_loss=None),
            Trial(settings=AdamWSettings(lr=0.1), seed=1, final_loss=3.0),
        ],
    )
    assert tuning.best.lr == 0.1


def test_the_best_has_the_lowest_loss():
    tuning = Tuning(
        grid=GRID,
        trials=[
            Trial(settings=AdamWSettings(lr=lr), seed=1, final_loss=loss)
            for lr, loss in {0.2: 1.5, 0.1: 1.0, 0.3: 1.2, 0.4: None}.items()
        ],
    )
    assert [settings.lr for settings in tuning.ranking()] == [0.1, 0.3, 0.2, 0.4]
    assert tuning.best.lr == 0.1


COMMITTED = [key for key in GRIDS if committed_path(*key).exists()]


def test_the_demonstration_is_tuned():
    assert {("text", "adamw"), ("text", "shampoo")} <= set(COMMITTED)


@pytest.mark.parametrize("key", COMMITTED, ids="-".join)
def test_committed_tunings_are_whole_and_of_their_grids(key, tmp_path, monkeypatch):
    copy = tmp_path / "tuning.json"
    shutil.copy(committed_path(*key), copy)
    monkeypatch.setattr(module, "_trial", None)
    tuning = committed(*key)
    # Nothing is left to run, so all stages were run to their ends.
    assert tune(GRIDS[key], copy) == tuning
    assert tuning.best == tuning.ranking()[0]
    assert 0 not in {trial.seed for trial in tuning.trials}  # the seed of the demonstration


def test_explicit_settings_win_over_tuned_ones():
    tuned = committed("text", "shampoo")
    settled = settle("text", "shampoo", ShampooSettings(beta1=0.5))
    assert settled == tuned.best.model_copy(update={"beta1": 0.5, "service": "embedded"})
    assert settle("digits", "sgd").lr == 0.1
    assert horizon("text", "shampoo") == tuned.grid.steps
    assert horizon("text", "shampoo", 7) == 7


def test_every_contender_has_the_same_budget_on_every_workload():
    for workload in COMPARED:
        assert {name for of, name in GRIDS if of == workload} == set(CONTENDERS)
    short = [grid for key, grid in GRIDS.items() if key not in {("text", "adamw"), ("text", "shampoo")}]
    assert {tuple(len(stage["lr"]) for stage in grid.stages) for grid in short} == {(5,)}
    for grid in short:
        if (grid.workload, grid.start.name) == ("text", "curveball"):
            # Measured: 396 ms a step beside AdamW's 81.
            assert grid.steps == DEFAULT_STEPS["text"] / 5
        else:
            assert grid.steps == DEFAULT_STEPS[grid.workload]
        assert grid.seed not in Compare.model_fields["seeds"].default
