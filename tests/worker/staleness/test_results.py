"""The folder of a study: what belongs together is kept together, and nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from preconditioner_worker.code_digest import normalised
from preconditioner_worker.results import ResultError
from preconditioner_worker.staleness import RunSpec, Study, StudyRun
from preconditioner_worker.staleness.fingerprint import CODE, Fingerprint, code_digest
from preconditioner_worker.staleness.rates import committed_path, rate, tuning_spec
from preconditioner_worker.staleness.results import check_rates

COMMITTED = Path(__file__).parents[3] / "worker" / "results" / "staleness"
SPEC = RunSpec(method="A", n=10, statistics="sum", grafting=True, seed=0)
LOSSES = [3.0, 2.5, 2.0, 1.5, 1.0]

Make = Callable[..., StudyRun]


@pytest.fixture
def run(make_run: Make) -> StudyRun:
    return make_run(SPEC, LOSSES)


@pytest.fixture
def study(tmp_path: Path, run: StudyRun) -> Study:
    study = Study(tmp_path / "study")
    study.begin(run.fingerprint)
    study.save(run)
    return study


def test_a_run_comes_back_as_it_was(study: Study, run: StudyRun) -> None:
    assert study.load(SPEC, run.lr) == run
    assert study.runs() == [run]
    assert study.load(SPEC.model_copy(update={"seed": 1})) is None
    assert not list(study.folder.rglob("*.partial"))
    study.begin(run.fingerprint)  # going on is allowed


def test_steps_to_a_target(run: StudyRun) -> None:
    assert (run.steps_to(3.5), run.steps_to(2.5), run.steps_to(1.2)) == (0, 10, 40)
    assert run.steps_to(0.9) == float("inf")


@pytest.mark.parametrize(
    ("change", "named"),
    [({"code": "f" * 16}, "code"), ({"torch": "1.0"}, "torch 2"), ({"cpu": "abacus"}, "is not abacus")],
)
def test_results_of_other_code_are_refused(
    study: Study, run: StudyRun, change: dict[str, str], named: str
) -> None:
    other = run.fingerprint.model_copy(update=change)
    with pytest.raises(ResultError, match=f"holds another study .*{named}.* choose another --folder"):
        study.begin(other)
    study.save(run.model_copy(update={"fingerprint": other}))
    with pytest.raises(ResultError, match=f"does not belong to its study: .*{named}"):
        study.runs()


def test_results_of_other_settings_are_refused(study: Study, run: StudyRun) -> None:
    settings = run.fingerprint.settings.model_copy(update={"steps": 50})
    with pytest.raises(ResultError, match="steps 100 is not 50"):
        study.begin(run.fingerprint.model_copy(update={"settings": settings}))


def test_another_learning_rate_is_refused(study: Study, run: StudyRun, make_run: Make) -> None:
    with pytest.raises(ResultError, match=r"made with the learning rate 0\.1, not 0\.2"):
        study.load(SPEC, 0.2)
    other = make_run(SPEC.model_copy(update={"n": 1}), LOSSES, lr=0.3)
    study.save(other)
    with pytest.raises(ResultError, match="a study has one for shampoo-sum-grafted"):
        study.runs()
    check_rates([run, make_run(RunSpec(method="adamw", seed=0), LOSSES, lr=0.3)])  # one for each optimizer


def test_damaged_renamed_and_absent_files_are_named(study: Study, tmp_path: Path) -> None:
    path = study.path(SPEC)
    path.rename(path.with_name("A-10-sum-grafted-seed1.json"))
    with pytest.raises(ResultError, match="was it renamed"):
        study.load(SPEC.model_copy(update={"seed": 1}))
    path.write_text('{"spec": 1}')
    with pytest.raises(ResultError, match=r"A-10-sum-grafted-seed0\.json' is damaged"):
        study.load(SPEC)
    with pytest.raises(ResultError, match=r"holds no runs; make some with 'staleness run'"):
        Study(tmp_path / "none").runs()


def test_the_digest_sees_code_and_nothing_else() -> None:
    source = '"""Text."""\nx = 1  # why\n\n\ndef f():\n    """Text."""\n    return x\n'
    assert normalised(source) == normalised("x = 1\ndef f(): return x")
    assert normalised(source) != normalised("x = 2\ndef f(): return x")
    assert normalised('def f():\n    """Text."""') == normalised("def f(): pass")
    assert len(code_digest()) == 16
    assert "preconditioner_client.engine" in CODE


def test_a_fingerprint_names_what_differs(run: StudyRun) -> None:
    here = Fingerprint.here(run.fingerprint.settings)
    assert here.differences(run.fingerprint) == []
    for name in ("code", "torch", "numpy", "cpu", "cpu_model", "python", "text"):
        (said,) = here.differences(here.model_copy(update={name: "another"}))
        assert said == f"{name} {getattr(here, name)} is not another"


def test_an_older_study_is_read_and_not_extended(tmp_path: Path) -> None:
    """From before fingerprints knew processor, Python and text."""
    shutil.copytree(COMMITTED, tmp_path / "study")
    for path in [tmp_path / "study" / "study.json", *(tmp_path / "study" / "runs").iterdir()]:
        content = json.loads(path.read_text())
        fingerprint = content.get("fingerprint", content)
        for name in ("cpu_model", "python", "text"):
            del fingerprint[name]
        path.write_text(json.dumps(content))
    study = Study(tmp_path / "study")
    assert study.fingerprint().python is None
    assert len(study.runs()) == len(list((COMMITTED / "runs").iterdir()))
    with pytest.raises(ResultError, match="python None is not"):
        study.begin(Fingerprint.here(study.fingerprint().settings))


def test_every_run_has_the_rate_of_its_optimizer_at_n_1() -> None:
    shampoo = rate("text", SPEC)
    for n, method in ((1, "A"), (1200, "A"), (10, "P"), (1, "frozen"), (100, "random"), (1200, "late")):
        assert rate("text", SPEC.model_copy(update={"n": n, "method": method})) == shampoo
    assert tuning_spec("shampoo-sum-grafted").n == 1
    assert tuning_spec("shampoo-ema-ungrafted").condition == "A-1-ema-ungrafted"
    assert tuning_spec("diagonal").condition == "diagonal-grafted"
    assert rate("text", RunSpec(method="adamw", seed=0)) > 0
    assert committed_path("text", "adamw").exists()
    with pytest.raises(ResultError, match="staleness tune --task maps --optimizers adamw"):
        rate("maps", RunSpec(method="adamw", seed=0))
