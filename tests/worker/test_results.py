"""Results come back from JSON as they were; CSV has a line per step."""

from __future__ import annotations

import csv
import errno
import math
from pathlib import Path

import pytest

from preconditioner_worker.results import ResultError, RunResult, write_text


def test_json_round_trip(make_run, tmp_path):
    run = make_run("shampoo", [3.0, 2.0])
    path = run.save(tmp_path / "runs" / "x")
    assert path.name == "shampoo-seed0.json"
    assert RunResult.load(path) == run


def test_a_diverged_run_keeps_its_nan(make_run, tmp_path):
    run = make_run("adamw", [3.0, math.nan])
    run.steps.loss[-1] = math.inf
    loaded = RunResult.load(run.save(tmp_path))
    assert loaded.diverged
    assert math.isnan(loaded.final_loss)
    assert math.isinf(loaded.steps.loss[-1])


def test_csv(make_run, tmp_path):
    make_run("shampoo", [3.0, 2.0], seed=4).save(tmp_path)
    with (tmp_path / "shampoo-seed4-steps.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 20
    assert rows[0] == {
        "step": "1", "loss": "9.0", "seconds": "0.5", "optimizer_seconds": "0.05", "age": "", "versions": "0"
    }  # fmt: skip
    with (tmp_path / "shampoo-seed4-evaluations.csv").open(newline="") as file:
        assert [row["loss"] for row in csv.DictReader(file)] == ["3.0", "2.0"]


def test_what_is_no_result_is_refused(tmp_path):
    with pytest.raises(ResultError, match="cannot read results"):
        RunResult.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{"settings": 3}')
    with pytest.raises(ResultError, match="not the result of a run"):
        RunResult.load(tmp_path / "bad.json")


def test_what_cannot_be_written_leaves_the_earlier_file(tmp_path, monkeypatch):
    path = write_text(tmp_path / "new" / "result.json", "whole")

    def full(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ResultError, match=r"cannot write '.*result\.json': No space left on device"):
        write_text(path, "other")
    assert path.read_text() == "whole"
    assert [file.name for file in path.parent.iterdir()] == ["result.json"]
