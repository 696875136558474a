"""From runs to verdicts, tables and pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from preconditioner_worker.results import ResultError
from preconditioner_worker.staleness import Study, StudyRun, Verdict, analyse, report
from preconditioner_worker.staleness.completeness import missing
from preconditioner_worker.staleness.report import headline, markdown

COMMITTED = Path(__file__).parents[3] / "worker" / "results"


def test_verdicts_of_a_valid_study(study_runs: list[StudyRun]) -> None:
    analysis = analyse(study_runs)
    (part,) = analysis.parts
    assert part.void == ()
    assert part.gap == pytest.approx(0.5, abs=1e-3)
    assert part.margin == pytest.approx(0.02)
    assert [(row.n, row.verdict) for row in part.rows] == [
        (1, None), (10, Verdict.HOLDS), (20, Verdict.FAILS)
    ]  # fmt: skip
    assert part.largest_that_holds == 10
    assert {row.method: row.verdict for row in part.controls} == dict.fromkeys(
        ("frozen", "random", "late"), Verdict.FAILS
    )
    assert [(row.youngest, row.oldest) for row in part.rows] == [(1, 1), (10, 19), (20, 39)]
    assert [row.pairs for row in (*part.rows, *part.controls)] == [None, 3, 3, 3, 3, 3]
    assert {row.method for row in analysis.optimizers} == {"diagonal", "adamw", "adagrad"}
    assert "2 of 5 seeds" in analysis.missing
    assert "the arm P(N)" in analysis.missing


def test_runs_that_are_shorter_than_the_full_ones_are_named(study_runs: list[StudyRun]) -> None:
    steps = study_runs[0].fingerprint.settings.steps
    assert steps < 12_000
    assert f"{12_000 - steps} of the 12000 steps of a run" in missing(study_runs)
    settings = study_runs[0].fingerprint.settings.model_copy(update={"steps": 12_000})
    full = [
        run.model_copy(update={"fingerprint": run.fingerprint.model_copy(update={"settings": settings})})
        for run in study_runs
    ]
    assert not any("steps" in lack for lack in missing(full))


def test_a_task_whose_negative_control_passes_is_void(study_runs: list[StudyRun]) -> None:
    fresh = {run.spec.seed: run.held_out_loss for run in study_runs if run.spec.condition.startswith("A-1-")}
    runs = [
        run.model_copy(update={"held_out_loss": fresh[run.spec.seed]}) if run.spec.method == "frozen" else run
        for run in study_runs
    ]
    (part,) = analyse(runs).parts
    assert part.void == ("the negative control 'frozen' does not fail: its verdict is holds",)
    assert part.largest_that_holds is None


def test_the_sequence_ends_at_the_first_n_that_does_not_hold(study_runs: list[StudyRun]) -> None:
    swapped = {10: 20, 20: 10}
    runs = [
        run.model_copy(update={"spec": run.spec.model_copy(update={"n": swapped[run.spec.n]})})
        if run.spec.method == "A" and run.spec.n in swapped
        else run
        for run in study_runs
    ]
    (part,) = analyse(runs).parts
    assert [row.verdict for row in part.rows] == [None, Verdict.FAILS, Verdict.HOLDS]
    assert part.largest_that_holds is None
    assert headline(part).endswith("no N > 1 is shown to hold; N = 10, the first in the sequence: fails")


def test_a_condition_that_lacks_a_seed_is_named(study_runs: list[StudyRun]) -> None:
    runs = [run for run in study_runs if run.spec.key != "late-20-sum-grafted-seed2"]
    analysis = analyse(runs)
    assert "the seed 2 of late-20-sum-grafted" in analysis.missing
    (part,) = analysis.parts
    late = next(row for row in part.controls if row.method == "late")
    assert (late.seeds, late.pairs) == (2, 2)


def test_a_late_beginning_is_laid_beside_a_delay_on_common_seeds(study_runs: list[StudyRun]) -> None:
    runs = [run for run in study_runs if run.spec.key != "late-20-sum-grafted-seed2"]
    (late,) = analyse(runs).parts[0].late_starts
    assert (late.n, late.seeds, late.verdict, late.late_verdict) == (
        20, (0, 1), Verdict.FAILS, Verdict.FAILS
    )  # fmt: skip
    described = late.describe(4)
    assert "is no evidence against stale preconditioners" in described
    (row,) = (row for row in analyse(runs).parts[0].rows if row.n == 20)
    fresh_late = {run.spec.seed: run.final_loss for run in runs if run.spec.method == "late"}
    stale = {run.spec.seed: run.final_loss for run in runs if run.spec.condition == row.condition}
    between = [stale[seed] - fresh_late[seed] for seed in (0, 1)]
    assert late.difference == pytest.approx(sum(between) / 2)
    assert (
        f"Age alone, A(20) against these fresh ones by the same criteria: {late.against_late.value}"
        in described
    )
    assert f"final loss {late.difference:+.4f} [" in described
    # Where the late beginning costs nothing, the delay has to answer for the loss.
    fresh = {run.spec.seed: run.held_out_loss for run in study_runs if run.spec.condition.startswith("A-1-")}
    (late,) = (
        analyse(
            [
                run.model_copy(update={"held_out_loss": fresh[run.spec.seed]})
                if run.spec.method == "late"
                else run
                for run in runs
            ]
        )
        .parts[0]
        .late_starts
    )
    assert "no evidence" not in late.describe(4)
    assert late.against_late is late.verdict is Verdict.FAILS


def test_a_diagonal_that_diverges_with_every_seed_voids_the_task(
    study_runs: list[StudyRun],
) -> None:
    diverged = {"diverged": True, "held_out_loss": [3.0, float("nan")]}
    analysis = analyse(
        [run.model_copy(update=diverged) if run.spec.method == "diagonal" else run for run in study_runs]
    )
    (part,) = analysis.parts
    assert "not clearly above zero" in part.void[0]
    assert "the task is void" in markdown(analysis, [], None)
    assert all(row.steps_to_target is None and row.steps_ratio is None for row in part.rows)


def test_an_arm_without_n_1_is_refused(study_runs: list[StudyRun]) -> None:
    with pytest.raises(ResultError, match=r"A\(N\) has no run with N = 1"):
        analyse([run for run in study_runs if run.spec.n != 1])


def test_a_diverged_run_fails_its_condition_and_stops_nothing(study_runs: list[StudyRun]) -> None:
    runs = [
        run.model_copy(update={"diverged": True, "held_out_loss": [3.0, float("nan")]})
        if run.spec.key == "A-10-sum-grafted-seed1"
        else run
        for run in study_runs
    ]
    (part,) = analyse(runs).parts
    row = next(row for row in part.rows if row.n == 10)
    assert (row.verdict, row.reason, row.diverged) == (Verdict.FAILS, "1 of 3 runs diverged", 1)


def test_a_report_is_made_of_the_files_alone(study_runs: list[StudyRun], tmp_path: Path) -> None:
    study = Study(tmp_path / "study")
    study.begin(study_runs[0].fingerprint)
    for run in study_runs:
        study.save(run)
    analysis, path = report(study.folder)
    text = path.read_text()
    assert "**This is a reduced run.**" in text
    assert "the largest N that holds is 10" in text
    assert "| A(10) | 10.00% | 10–19 | 3 |" in text
    assert json.loads((study.folder / "analysis.json").read_text())["runs"] == analysis.runs == 27
    report(study.folder, tmp_path / "again")
    written = sorted(path.name for path in (tmp_path / "again").iterdir())
    assert len([name for name in written if name.endswith(".png")]) == 4
    for name in written:
        assert (tmp_path / "again" / name).read_bytes() == (study.folder / name).read_bytes()


@pytest.mark.parametrize("study", ["staleness", "staleness-regression"])
def test_the_committed_report_comes_from_the_committed_runs(study: str, tmp_path: Path) -> None:
    report(COMMITTED / study, tmp_path)
    for name in ("report.md", "analysis.json"):
        assert (tmp_path / name).read_bytes() == (COMMITTED / study / name).read_bytes()
