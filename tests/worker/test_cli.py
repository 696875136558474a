"""The command line: errors name the option and the way out; options come from their places in order."""

from __future__ import annotations

import builtins
import json
import subprocess
import sys

import pytest

from preconditioner_worker.application import Application
from preconditioner_worker.cli import main
from preconditioner_worker.commands import Train
from preconditioner_worker.results import RunResult


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code not in (0, None)
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--step", "3"], "unrecognized arguments: --step 3"),
        (
            ["train", "--workload", "images"],
            "no workload is called 'images'; there are autoencoder, digits, digits-b",
        ),
        (["train", "--steps", "-3"], "train.steps: Input should be greater than 0, not '-3'"),
        (["train", "--adamw.lr", "0"], "train.adamw.lr: Input should be greater than 0"),
        (["train", "--optimizer", "lion"], "lion"),
        (["train", "--shampoo.service", "nowhere"], "none of 'embedded', 'host:port' and 'local:STEPS'"),
        (["train", "--shampoo.service", "local:x"], "needs a number of steps"),
        (["train", "--text", "/does/not/exist"], "'/does/not/exist' does not exist"),
        (["train", "--workload", "digits", "--text", "x"], "--text belongs to the workload 'text'"),
        (["compare", "--steps", "lion=3"], "no optimizer is called 'lion'"),
        (
            ["tune", "--workload", "digits", "--optimizer", "sgd"],
            "no grid for digits sgd; there are: digits-batchnorm adamw",
        ),
        (["--config", "none.toml", "train"], "there is no such file"),
    ],
)
def test_mistakes(capsys, arguments, message):
    assert message in refused(capsys, *arguments)


def test_unknown_keys_in_environment_and_file(capsys, monkeypatch, tmp_path):
    (tmp_path / "c.toml").write_text("[train]\nstep = 3\n")
    assert "there is no option 'train.step'" in refused(capsys, "--config", "c.toml", "train")
    (tmp_path / "c.toml").write_text("[train\n")
    assert "is not TOML" in refused(capsys, "--config", "c.toml", "train")
    monkeypatch.setenv("PRECONDITIONER_WORKER_TRAIN__STEP", "3")
    assert "PRECONDITIONER_WORKER_TRAIN__STEP" in refused(capsys, "train")


def test_argument_before_environment_before_file_before_default(monkeypatch, tmp_path):
    seen: list[Train] = []
    monkeypatch.setattr(Train, "run", lambda self, console: seen.append(self) or 0)
    (tmp_path / "c.toml").write_text(
        "[train]\nsteps = 1\nseed = 1\nevaluate_every = 1\n[train.shampoo]\nbeta1 = 0.1\n[demo]\nseed = 9\n"
    )
    monkeypatch.setenv("PRECONDITIONER_WORKER_TRAIN__STEPS", "2")
    monkeypatch.setenv("PRECONDITIONER_WORKER_TRAIN__SEED", "2")
    monkeypatch.setenv("PRECONDITIONER_WORKER_TRAIN__SHAMPOO__LR", "0.2")
    monkeypatch.setenv("PRECONDITIONER_WORKER_COMPARE__NAME", "other")
    main(["--config", "c.toml", "train", "--steps", "3", "--shampoo.max-staleness", "30"])
    (train,) = seen
    assert (train.steps, train.seed, train.evaluate_every, train.threads) == (3, 2, 1, 1)
    assert train.shampoo.model_dump(include=train.shampoo.model_fields_set) == {
        "beta1": 0.1, "lr": 0.2, "max_staleness": 30
    }  # fmt: skip


def test_missing_extras_are_named(monkeypatch, capsys):
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("pydantic_settings"):
            raise ModuleNotFoundError("No module named 'pydantic_settings'", name="pydantic_settings")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    message = refused(capsys, "train")
    assert "pydantic_settings is not installed; install async-preconditioner[worker] from" in message


def test_help_of_every_command(capsys):
    for name in Application.model_fields:
        if name != "config":
            with pytest.raises(SystemExit) as stopped:
                main([name.replace("_", "-"), "--help"])
            assert stopped.value.code == 0
            assert f"preconditioner-worker {name.replace('_', '-')}" in capsys.readouterr().out


def test_train_end_to_end(tmp_path, capsys):
    main(["train", "--workload", "digits", "--optimizer", "shampoo", "--steps", "25", "--seed", "3",
          "--evaluate-every", "10", "--shampoo.service", "local:3", "--name", "mine"])  # fmt: skip
    run = RunResult.load(tmp_path / "runs" / "mine" / "shampoo-seed3.json")
    assert run.settings.optimizer.service == "local:3"
    assert len(run.steps.loss) == 25
    assert (tmp_path / "runs" / "mine" / "curves.png").stat().st_size > 10_000
    assert "held-out loss" in capsys.readouterr().out


def test_a_diverged_run_exits_with_1(tmp_path):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--workload", "digits", "--optimizer", "sgd", "--sgd.lr", "1e6", "--steps", "300"])
    assert stopped.value.code == 1
    assert (tmp_path / "runs" / "train-digits-sgd" / "sgd-seed0.json").exists()


def test_compare_end_to_end(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "preconditioner_worker.cli", "compare", "--workload", "digits",
         "--optimizers", "shampoo,sgd", "--steps", "adamw=20,shampoo=15,sgd=10", "--seeds", "0,1",
         "--evaluate-every", "5", "--shampoo.service", "local:3"],
        check=True, timeout=120,
    )  # fmt: skip
    folder = tmp_path / "runs" / "compare-digits"
    rows = json.loads((folder / "comparison.json").read_text())["rows"]
    assert [(row["label"], row["steps"], row["seeds"]) for row in rows] == [
        ("adamw", 20, 2), ("shampoo", 15, 2), ("sgd", 10, 2)
    ]  # fmt: skip
    assert (folder / "curves.png").exists()
    assert len(list(folder.glob("*-seed?.json"))) == 6
