"""Every example under client/examples runs, against a real service, and goes on from its checkpoint."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.distributed import run as launcher

from forks import end_fork, start_fork
from preconditioner_client import LocalExchange, Shampoo
from service_process import free_port

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


def test_the_reporters_of_the_hugging_face_trainer_see_the_metrics(example, service, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    arguments = ["--service", service, "--steps", 10, "--output", tmp_path, "--report-to", "tensorboard"]
    run(example("hf_trainer"), *arguments)
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    assert [e.value for e in events.Scalars("train/preconditioner/step")] == [10.0]


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


@pytest.mark.parametrize("settings", [[], ["--precision", "bf16-mixed", "--attach"]])
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


def results_of(output, ranks):
    """What all ranks of an example printed."""
    # Ranks share the pipe, so two lines may have run into one.
    lines = output.replace("}{", "}\n{").splitlines()
    results = [json.loads(line) for line in lines if line.startswith('{"')]
    assert len(results) == ranks
    assert all(math.isfinite(result["loss"]) for result in results)
    assert all(result["versions_adopted"] > 0 for result in results)
    return results


def torchrun(folder, name, ranks, *arguments):
    """Run an example as ``torchrun`` does; the results of all ranks, and their standard error."""
    output, errors = (folder / f"{stream}-{time.monotonic_ns()}.txt" for stream in ("output", "errors"))
    command = ["--standalone", "--nproc-per-node", ranks, EXAMPLES / f"{name}.py", *arguments]
    process = start_fork(launcher.main, [str(part) for part in command], output=output, errors=errors)
    process.join(200)
    status = process.exitcode
    end_fork(process)
    assert status == 0, errors.read_text()[-3000:]
    return results_of(output.read_text(), ranks), errors.read_text()


def test_ddp_goes_on_from_its_checkpoint_on_another_number_of_ranks(service, tmp_path):
    common = ["--service", service, "--checkpoint", tmp_path / "state"]
    both, _ = torchrun(tmp_path, "ddp", 2, "--steps", 15, *common)
    assert all(result["replicas_are_identical"] for result in both)
    (alone,), _ = torchrun(tmp_path, "ddp", 1, "--steps", 30, *common)
    assert alone["step"] == 30
    # Every block has one owner.
    assert sum(result["blocks"] for result in both) == alone["blocks"]


def test_fsdp2_goes_on_from_its_checkpoint(service, tmp_path):
    common = ["--service", service, "--checkpoint", tmp_path / "state"]
    for steps in (15, 30):
        results, _ = torchrun(tmp_path, "fsdp2", 2, "--steps", steps, *common)
        assert {result["step"] for result in results} == {steps}


def test_replicas_of_shards_train_through_a_service_on_four_ranks(service, tmp_path):
    results, _ = torchrun(tmp_path, "fsdp2", 4, "--replicas", 2, "--steps", 15, "--service", service)
    assert {result["step"] for result in results} == {15}


def all_statistics(model, states):
    """How many blocks of a model have statistics in a checkpoint, and how many there are."""
    keys = [k for s in states for k, v in s.items() if ".statistics." in k and v.any()]
    whole = Shampoo(model.named_parameters(), service=LocalExchange()).state_dict()
    expected = [k for s in whole["state"].values() for k in s if ".statistics." in k]
    return len(keys), len(expected)


def test_the_hugging_face_trainer_saves_the_state_of_all_ranks(example, service, tmp_path):
    arguments = ["--service", service, "--output", tmp_path, "--steps", 20]
    _, errors = torchrun(tmp_path, "hf_trainer", 2, *arguments)
    assert "consolidate_state_dict" not in errors
    saved = torch.load(tmp_path / "checkpoint-20" / "optimizer.pt", weights_only=True)
    found, expected = all_statistics(example("hf_trainer").small_gpt2(), saved["state"].values())
    assert found == expected
    # And one process goes on from it.
    result = run(example("hf_trainer"), *arguments[:-1], 30, "--resume")
    assert result["step"] == 30


def test_accelerate_saves_the_state_of_all_ranks(example, service, tmp_path):
    torchrun(
        tmp_path,
        "accelerate_loop",
        2,
        "--service",
        service,
        "--checkpoint",
        tmp_path / "state",
        "--steps",
        20,
    )
    saved = torch.load(tmp_path / "state" / "optimizer.bin", weights_only=True)
    found, expected = all_statistics(example("accelerate_loop").small_model(), saved["state"].values())
    assert found == expected


def test_lightning_saves_what_is_attached_on_all_ranks(example, service, tmp_path):
    path = tmp_path / "run.ckpt"
    arguments = ["--service", service, "--checkpoint", path, "--steps", 20, "--devices", 2, "--attach"]
    finished = subprocess.run(
        [sys.executable, EXAMPLES / "lightning_module.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "MASTER_PORT": str(free_port())},
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    results_of(finished.stdout, 2)
    saved = torch.load(path, weights_only=True)["optimizer_states"][0]["preconditioner"]["state"]
    found, expected = all_statistics(example("lightning_module").NextByte("embedded", False), saved)
    assert found == expected
