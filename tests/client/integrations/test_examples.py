"""Every example under client/examples runs, against a real service, and goes on from its checkpoint."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[3] / "client" / "examples"


def run(module, *arguments):
    """An example's result; its loss is always finite."""
    result = module.main([str(a) for a in arguments])
    assert math.isfinite(result["loss"])
    return result


def test_the_plain_loop_as_its_docstring_says_with_an_embedded_service():
    finished = subprocess.run(
        [sys.executable, str(EXAMPLES / "plain_loop.py"), "--steps", "40"],
        capture_output=True,
        text=True,
        timeout=200,
        env={k: v for k, v in os.environ.items() if k != "PRECONDITIONER_TOKEN"},
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    result = json.loads(finished.stdout.splitlines()[-1])
    assert result["versions_adopted"] > 0
    assert math.isfinite(result["loss"])
    assert "step 20: loss" in finished.stdout


@pytest.mark.parametrize("attach", [[], ["--attach"]])
def test_the_plain_loop_goes_on_from_its_checkpoint_and_writes_metrics(example, service, tmp_path, attach):
    plain = example("plain_loop")
    common = ["--service", service, "--checkpoint", tmp_path / "plain.pt", *attach]
    first = run(plain, "--steps", 30, *common)
    assert first["step"] == 30
    assert first["versions_adopted"] > 0
    second = run(plain, "--steps", 60, "--tensorboard", tmp_path / "events", *common)
    assert second["step"] == 60
    assert second["versions_adopted"] > 0
    assert second["loss"] < 5

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "events")).Reload()
    assert "preconditioner/ages_mean" in events.Tags()["scalars"]
    assert [e.step for e in events.Scalars("preconditioner/versions_adopted")] == [40]


def last_log(folder, step):
    state = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return next(entry for entry in reversed(state["log_history"]) if "loss" in entry)


@pytest.mark.parametrize("settings", [[], ["--attach", "--bf16"]])
def test_the_hugging_face_trainer_resumes_bit_for_bit(example, service, tmp_path, settings):
    """From the Trainer's own checkpoint, and so that the weights are those of the uninterrupted run."""
    hf = example("hf_trainer")
    common = ["--service", service, "--output", tmp_path, "--steps", 30, "--save-steps", 15, *settings]
    result = run(hf, *common)
    assert result["versions_adopted"] > 0
    assert last_log(tmp_path, 30)["preconditioner/versions_adopted"] > 0
    weights = tmp_path / "checkpoint-30" / "model.safetensors"
    uninterrupted = weights.read_bytes()
    weights.parent.rename(tmp_path / "uninterrupted")
    result = run(hf, *common, "--resume")
    assert result["step"] == 30
    assert weights.read_bytes() == uninterrupted


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_accelerate_loop_goes_on_from_its_state(example, service, tmp_path, precision):
    loop = example("accelerate_loop")
    common = ["--service", service, "--checkpoint", tmp_path / "state", "--mixed-precision", precision]
    first = run(loop, "--steps", 20, *common)
    assert first["step"] == 20
    assert first["versions_adopted"] > 0
    second = run(loop, "--steps", 40, *common)
    assert second["step"] == 40
    assert second["versions_adopted"] > 0


@pytest.mark.parametrize(
    "settings", [[], ["--attach"], ["--precision", "bf16-mixed"], ["--precision", "bf16-mixed", "--attach"]]
)
def test_the_lightning_module_goes_on_from_its_checkpoint(example, service, tmp_path, settings):
    module = example("lightning_module")
    common = ["--service", service, "--checkpoint", tmp_path / "run.ckpt", *settings]
    first = run(module, "--steps", 20, *common)
    assert first["step"] == 20
    assert first["versions_adopted"] > 0
    second = run(module, "--steps", 40, "--log", tmp_path, *common)
    assert second["step"] == 40
    (csv,) = tmp_path.rglob("metrics.csv")
    assert "preconditioner/versions_adopted" in csv.read_text().splitlines()[0]
