"""A comparison goes on where it was, keeps what diverged, and mixes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from preconditioner_worker import experiments
from preconditioner_worker.cli import main
from preconditioner_worker.comparison import Comparison
from preconditioner_worker.contenders import CONTENDERS, AdamSettings
from preconditioner_worker.experiments import run_all
from preconditioner_worker.results import Environment, ResultError, RunResult, RunSettings
from preconditioner_worker.workloads import AutoencoderWorkload, open_workload

WORKLOAD = AutoencoderWorkload(batch_size=16)
QUIET = Console(quiet=True)


def settings(seed: int, **changes: object) -> RunSettings:
    fields = {"label": "adam", "workload": "autoencoder", "optimizer": AdamSettings(), "steps": 4,
              "evaluate_every": 2, "seed": seed}  # fmt: skip
    return RunSettings.model_validate({**fields, **changes})


def test_what_was_made_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (first,) = run_all(WORKLOAD, [settings(0)], tmp_path, QUIET, resume=True)
    made = []
    train = experiments.train
    monkeypatch.setattr(
        experiments, "train", lambda w, s, **kwargs: made.append(s.seed) or train(w, s, **kwargs)
    )
    results = run_all(WORKLOAD, [settings(0), settings(1)], tmp_path, QUIET, resume=True)
    assert made == [1]
    assert results[0] == first
    run_all(WORKLOAD, [settings(0)], tmp_path, QUIET)  # a demonstration is made anew
    assert made == [1, 0]


def test_other_settings_are_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_all(WORKLOAD, [settings(0)], tmp_path, QUIET)
    monkeypatch.setattr(experiments, "train", None)
    other = settings(0, steps=5, optimizer=AdamSettings(lr=0.5))
    with pytest.raises(ResultError, match=r"optimizer\.lr 0\.003 is not 0\.5; steps 4 is not 5.*--name"):
        run_all(WORKLOAD, [settings(1), other], tmp_path, QUIET, resume=True)


def test_other_code_is_refused(tmp_path: Path) -> None:
    run_all(WORKLOAD, [settings(0)], tmp_path, QUIET)
    path = tmp_path / "adam-seed0.json"
    path.write_text(path.read_text().replace(Environment.here().code, "0123456789abcdef"))
    with pytest.raises(ResultError, match="code 0123456789abcdef is not"):
        run_all(WORKLOAD, [settings(0)], tmp_path, QUIET, resume=True)
    # As files of before, which do not tell the processor.
    result = RunResult.load(path)
    path.write_text(result.model_dump_json(exclude={"environment": {"cpu_model"}}))
    assert RunResult.load(path).environment.cpu_model is None
    with pytest.raises(ResultError, match="cpu_model None is not"):
        run_all(WORKLOAD, [settings(0)], tmp_path, QUIET, resume=True)


def test_another_text_in_the_same_file_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a rose is a rose\n" * 20_000)
    run = settings(0, workload="text", text=text, steps=1, evaluate_every=1)
    run_all(open_workload("text", text=text), [run], tmp_path, QUIET)
    run_all(open_workload("text", text=text), [run], tmp_path, QUIET, resume=True)
    text.write_text("a nose is a rose\n" * 20_000)
    with pytest.raises(ResultError, match=r"text [0-9a-f]{16} is not [0-9a-f]{16}"):
        run_all(open_workload("text", text=text), [run], tmp_path, QUIET, resume=True)


def test_all_contenders_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    steps = ",".join(f"{name}=6" for name in CONTENDERS)
    arguments = ["compare", "--workload", "autoencoder", "--seeds", "0,1,2", "--steps", steps,
                 "--evaluate-every", "3", "--shampoo.service", "local:2", "--shampoo-2020.service", "local:2",
                 "--kfac.service", "local:2",
                 "--adamw-attached.service", "local:2", "--sgd-attached.service", "local:2",
                 "--sgd.lr", "1e38"]  # fmt: skip
    main(arguments)
    folder = tmp_path / "runs" / "compare-autoencoder"
    text = (folder / "comparison.json").read_text()
    comparison = Comparison.model_validate_json(text)
    assert {row.label for row in comparison.rows} == set(CONTENDERS)
    assert comparison.rows[0].label == "adamw"
    for row in comparison.rows:
        assert row.seeds == 3
        assert row.step_ms.median > 0
        # What diverged is recorded, and stopped nothing.
        assert row.diverged == (3 if row.label == "sgd" else 0)
        assert (row.final_loss_deviation is None) == (row.label == "sgd")
        assert row.steps_ratio_range[0] <= row.steps_ratio_range[1]
    assert len(list(folder.glob("*-seed?.json"))) == 3 * len(CONTENDERS)
    made = sorted(folder.glob("*-seed?.json"), key=lambda path: path.stat().st_mtime_ns)
    seeds = [path.stem[-1] for path in made]
    assert seeds == sorted(seeds)  # contenders of one seed run next to each other
    assert (folder / "curves.png").exists()
    assert "diverged" in capsys.readouterr().out
    monkeypatch.setattr(experiments, "train", None)
    main(arguments)  # nothing is left to train
    assert json.loads((folder / "comparison.json").read_text()) == json.loads(text)
