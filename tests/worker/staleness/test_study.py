"""The commands, in a short form of the study: run, interrupt, go on, report; once through a real service."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from preconditioner_worker.cli import main
from preconditioner_worker.results import ResultError
from preconditioner_worker.staleness import RunSpec, StudyRun, StudySettings, train
from preconditioner_worker.staleness.commands import StalenessRun
from preconditioner_worker.staleness.rates import RateTuning, committed_path, rate, rates
from preconditioner_worker.staleness.real import RealComparison, first_difference, largest_difference
from preconditioner_worker.staleness.results import read, write

A10 = RunSpec(method="A", n=10, statistics="sum", grafting=True, seed=0)
SHORT = ["--arms", "A", "--delays", "10", "--statistics", "sum", "--grafting", "on", "--steps", "60",
         "--evaluate-every", "10", "--blend-steps", "5", "--jobs", "1"]  # fmt: skip


def arguments(folder: Path, seeds: str) -> list[str]:
    return ["staleness", "run", "--folder", str(folder), "--seeds", seeds, *SHORT]


def test_a_study_is_interrupted_goes_on_and_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "study"
    process = subprocess.Popen(
        [sys.executable, "-m", "preconditioner_worker.cli", *arguments(folder, "0,1")],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(folder.glob("runs/*.json")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130
    assert process.stderr is not None
    assert "interrupted" in process.stderr.read()
    process.stderr.close()
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*.json")}
    assert 0 < len(kept) < 16

    main(arguments(folder, "0"))
    assert all(path.stat().st_mtime_ns == made for path, made in kept.items())
    again = train(A10, StudySettings(steps=60, evaluate_every=10, blend_steps=5), rate("text", A10))
    assert read(folder / "runs" / f"{A10.key}.json", StudyRun).loss_digest == again.loss_digest
    text = capsys.readouterr().out
    assert f"{sum('seed0' in path.name for path in kept)} of 8 runs are there already" in text
    assert "A-10-sum-grafted: " in text
    assert "reduced: without" in text
    assert "seed0: held-out loss (nats per byte): " in text
    assert {"A-sum-grafted-loss.png", "A-sum-grafted-drift.png"} <= {p.name for p in folder.glob("*.png")}

    with pytest.raises(SystemExit) as ended:
        main([*arguments(folder, "0"), "--steps", "50"])
    assert ended.value.code == 1
    assert "steps 60 is not 50" in capsys.readouterr().err


def test_mistakes_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for options, said in (
        (["run", "--task", "maps"], "no task is called 'maps'; there are regression, text"),
        (["tune", "--optimizers", "sgd"], "no grid for 'sgd'; there are adamw"),
        (["run", "--delays", "0"], "greater than 0"),
        (["report", "--folder", str(tmp_path)], "holds no runs"),
        (["real", "--steps", "20", "--delay", "10"], "20 steps are too few"),
    ):
        with pytest.raises(SystemExit):
            main(["staleness", *options])
        assert said in capsys.readouterr().err


def test_a_study_without_a_tuned_rate_begins_no_folder(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "study"
    with pytest.raises(SystemExit):
        options = ["run", "--task", "regression", "--statistics", "ema", "--grafting", "on,off", "--folder"]
        main(["staleness", *options, str(folder)])
    assert "--optimizers shampoo-ema-grafted,shampoo-ema-ungrafted" in " ".join(
        capsys.readouterr().err.split()
    )
    assert not folder.exists()


def test_the_defaults_need_no_tuning() -> None:
    assert set(rates("text", StalenessRun().specs())) == {
        "adagrad", "adamw", "diagonal", "shampoo-sum-grafted"
    }  # fmt: skip


def test_an_interrupted_tuning_is_no_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read(committed_path("text", A10.tuned_as), RateTuning)
    partial = whole.model_copy(update={"trials": whole.trials[:-1]})
    monkeypatch.setattr(
        "preconditioner_worker.staleness.rates.committed_path", lambda *_: tmp_path / "part.json"
    )
    write(tmp_path / "part.json", partial)
    with pytest.raises(ResultError, match="tuned over its whole grid"):
        rate("text", A10)
    write(tmp_path / "part.json", whole)
    assert rate("text", A10) == whole.best


def test_series_are_compared_bit_by_bit() -> None:
    assert first_difference([1.0, 2.0], [1.0, 2.0]) is None
    assert first_difference([1.0, 2.0, 3.0], [1.0, 2.5, 3.0]) == 2
    assert first_difference([1.0], [1.0, 2.0]) == 2
    assert largest_difference([1.0, 2.0], [1.0, 2.5]) == 0.5


@pytest.mark.slow
def test_a_run_through_the_service_has_the_ages_of_the_arm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["staleness", "real", "--folder", str(tmp_path), "--delay", "10", "--steps", "60"])
    found = read(tmp_path / "real.json", RealComparison)
    assert found.ages_match
    assert found.real.ages == {age: 5 - (age == 19) - (age > 10 and age != 19) for age in range(10, 20)}
    assert found.real.versions_adopted == found.virtual.versions_adopted == 5 * found.real.blocks
    assert found.largest_difference < 1e-4
    assert "60 steps, once with roots from an embedded service" in capsys.readouterr().out
    assert json.loads((tmp_path / "real.json").read_text())["first_difference"] == found.first_difference
