"""The large-batch check: its set, its cells, and the command from the first run to the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from preconditioner_worker.cli import main
from preconditioner_worker.large_batch import (
    Cell,
    CellRun,
    Study,
    StudySettings,
    analyse,
    cells,
    make,
    report,
)
from preconditioner_worker.large_batch.design import BATCH_SIZES, OPTIMIZERS, contender, grid, interval
from preconditioner_worker.large_batch.results import environment
from preconditioner_worker.results import ResultError
from preconditioner_worker.workloads import WorkloadError
from preconditioner_worker.workloads.digits import DigitsWorkload
from preconditioner_worker.workloads.digits_shifted import (
    EMPTY,
    SHIFTS,
    TRAINING_IMAGES,
    ShiftedDigitsWorkload,
)

COMMITTED = Path(__file__).parents[2] / "worker" / "results" / "large-batch"
SHORT = StudySettings(epochs=1, channels=2)


@pytest.fixture(scope="module")
def workload() -> ShiftedDigitsWorkload:
    return ShiftedDigitsWorkload(batch_size=4096)


def test_the_set_is_every_training_image_at_nine_positions(workload: ShiftedDigitsWorkload) -> None:
    plain = DigitsWorkload()
    assert torch.equal(workload.held_out.inputs, plain.held_out.inputs)
    assert len(workload.train.targets) == TRAINING_IMAGES == 12_933
    assert plain.train.inputs.min() == torch.tensor(EMPTY)
    for (down, right), shifted, labels in zip(
        SHIFTS, workload.train.inputs.chunk(9), workload.train.targets.chunk(9), strict=True
    ):
        assert torch.equal(labels, plain.train.targets)
        expected = torch.full_like(plain.train.inputs, EMPTY)
        for row in range(8):
            for column in range(8):
                if 0 <= row - down < 8 and 0 <= column - right < 8:
                    expected[..., row, column] = plain.train.inputs[..., row - down, column - right]
        assert torch.equal(shifted, expected)


def test_an_epoch_is_a_permutation_without_its_incomplete_end(workload: ShiftedDigitsWorkload) -> None:
    numbered = workload.train._replace(targets=torch.arange(TRAINING_IMAGES))
    mine = ShiftedDigitsWorkload(batch_size=4096)
    mine.train = numbered
    epochs = [torch.cat([mine.batch(0, step).targets for step in steps]) for steps in ((0, 1, 2), (3, 4, 5))]
    assert [len(seen.unique()) for seen in epochs] == [3 * 4096, 3 * 4096]
    assert not torch.equal(*epochs)
    with pytest.raises(WorkloadError, match="a batch of 12934 is more than the 12933 training images"):
        ShiftedDigitsWorkload(batch_size=12_934)


def test_an_evaluation_measures_weights_whatever_the_running_averages(
    workload: ShiftedDigitsWorkload,
) -> None:
    model = workload.build_model(0)
    before = workload.evaluate(model)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.running_mean.fill_(5.0)
    assert workload.evaluate(model) == before
    assert all(norm.running_mean.eq(5.0).all() and norm.momentum == 0.1 for norm in norms)


def test_rates_follow_their_rules_and_preconditioners_are_late_by_an_interval() -> None:
    assert grid("sgd", 64) == (0.01, 0.03, 0.09)
    assert grid("sgd", 4096)[1] == pytest.approx(64 * 0.03)
    assert grid("adam", 4096)[1] == pytest.approx(8 * 0.008)
    assert grid("lars", 4096) == grid("lars", 32) == (2.67, 8.0, 24.0)
    assert [interval(size) for size in BATCH_SIZES] == [10, 10, 10, 6, 3, 1, 1, 1]
    assert {
        (c.refresh_every, c.service) for name in ("kfac", "shampoo") for c in [contender(name, 512, 0.1)]
    } == {(3, "local:3")}


@pytest.mark.parametrize(
    ("losses", "tried", "best", "at_edge"),
    [
        ([0.2, 0.1, 0.3], (1.0, 3.0, 9.0), 3.0, False),
        ([0.3, 0.2, 0.1, 0.2], (1.0, 3.0, 9.0, 27.0), 9.0, False),
        ([0.1, 0.2, 9.0, 0.05, 0.2], (1.0, 3.0, 9.0, 0.333, 0.111), 0.333, False),
        ([0.6, 0.5, 0.4, 0.3, 0.2, 0.1], (1.0, 3.0, 9.0, 27.0, 81.0, 243.0), 243.0, True),
        ([9.0, 9.0, 9.0, 9.0, 0.2, 0.3], (1.0, 3.0, 9.0, 0.333, 0.111, 0.037), 0.111, False),
        ([9.0] * 6, (1.0, 3.0, 9.0, 0.333, 0.111, 0.037), None, False),
    ],
)
def test_rates_are_tried_beyond_an_end_that_is_best(
    losses: list[float], tried: tuple[float, ...], best: float | None, at_edge: bool
) -> None:
    empty = Cell.empty("sgd", 64, SHORT, environment())
    cell = empty.model_copy(update={"rates": (1.0, 3.0, 9.0)})
    for rate, loss in zip(tried, losses, strict=True):
        assert (cell.best, cell.next_rate, cell.complete([])) == (None, pytest.approx(rate), False)
        cell = cell.model_copy(update={"tuning": (*cell.tuning, run_of(rate, 1, loss))})
    assert (cell.best, cell.next_rate, cell.at_edge) == (best, None, at_edge)
    assert cell.complete([])


def test_a_cell_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, empty = Study(tmp_path), Cell.empty("shampoo", 4096, SHORT, environment())

    def stop(epochs: int) -> None:
        if epochs == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        make(empty, [0], study, report=stop)
    assert [run.lr for run in study.resume(empty).tuning] == [empty.rates[0]]
    told: list[int] = []
    cell = make(empty, [0], study, report=told.append)
    assert told == list(range(2, len(cell.tuning) + 2))
    tried = [run.lr for run in cell.tuning]
    assert tried[:3] == list(empty.rates)
    assert len(tried) == 6 or min(tried) < cell.best < max(tried)
    assert [(run.lr, run.seed, run.steps, run.oldest) for run in cell.runs] == [(cell.best, 0, 3, 1)]
    assert study.resume(empty) == cell
    assert not cell.complete([0, 2])
    more = make(empty, [0, 2], study)
    assert more.runs[:1] == cell.runs
    assert [run.seed for run in more.runs] == [0, 2]
    # The same run again, bit for bit.
    study.save(cell.model_copy(update={"runs": ()}))
    assert make(empty, [0], study).runs[0].held_out_loss == cell.runs[0].held_out_loss

    monkeypatch.setattr(cells, "environment", lambda: empty.environment.model_copy(update={"code": "other"}))
    with pytest.raises(ResultError, match="the code changed while the study ran"):
        make(empty, [0, 2, 3], study)


def run_of(lr: float, seed: int, loss: float) -> CellRun:
    return CellRun(
        lr=lr, seed=seed, steps=30, held_out_loss=(3.0, loss), accuracy=1 - loss / 10,
        diverged=not loss < 2.31, versions_adopted=0, oldest=None, seconds=6.0,
    )  # fmt: skip


def cell_of(optimizer: str, size: int, losses: list[float], seeds: list[float]) -> Cell:
    empty = Cell.empty(optimizer, size, StudySettings(), environment())
    tuned = empty
    for loss in losses:
        assert tuned.next_rate is not None
        tuned = tuned.model_copy(update={"tuning": (*tuned.tuning, run_of(tuned.next_rate, 1, loss))})
    runs = tuple(run_of(tuned.best or 0, seed, loss) for seed, loss in zip((0, 2, 3), seeds, strict=False))
    return tuned.model_copy(update={"runs": runs})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    study = Study(tmp_path / "study")
    for size in BATCH_SIZES:
        for optimizer in OPTIMIZERS:
            worse = 0.01 * BATCH_SIZES.index(size) * (OPTIMIZERS.index(optimizer) + 1)
            study.save(cell_of(optimizer, size, [0.2, 0.1, 0.3], [0.1 + worse, 0.11 + worse, 0.12 + worse]))
    return study.folder


def test_a_report_is_made_of_the_files_alone(folder: Path) -> None:
    study = Study(folder)
    study.save(cell_of("sgd", 4096, [9.0] * 6, []))
    study.save(cell_of("lars", 4096, [0.4, 9.0, 9.0, 0.3, 0.2, 0.1], [0.1, 0.12, float("nan")]))
    study.save(cell_of("lamb", 4096, [0.1, 0.2, 0.3], []))
    study.path(cell_of("adam", 32, [], [])).unlink()
    study.save(cell_of("adam", 64, [0.1], []))
    analysis, path = report(folder)
    text = path.read_text()
    assert (
        "It lacks adam at 32; rates beyond the grid and all seeds of lamb at 4096; "
        "2 of 3 rates and all seeds of adam at 64."
    ) in text
    assert "| sgd | 4096 | 30 | – | 6 of 6 | 0 | 0 | – | – |  |" in text
    assert "| lars | 4096 | 30 | 0.099* | 2 of 6 | 3 | 1 |" in text
    assert "| sgd | 64 | 2020 | 0.03 | 0 of 3 | 3 | 0 | 0.1200 ± 0.0100 | 98.80 ± 0.10 |  |" in text
    assert "(1 of 3 diverged)" in text
    assert (analysis.kept_up_to("sgd"), analysis.kept_up_to("shampoo")) == (2048, 64)
    assert json.loads((folder / "analysis.json").read_text())["runs"] == analysis.runs
    report(folder, folder / "again")
    for name in ("report.md", "analysis.json", "loss-against-batch-size.png"):
        assert (folder / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_the_committed_report_comes_from_the_committed_cells(tmp_path: Path) -> None:
    report(COMMITTED, tmp_path)
    for name in ("report.md", "analysis.json"):
        assert (tmp_path / name).read_bytes() == (COMMITTED / name).read_bytes()


def test_foreign_results_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = Study(folder)
    assert analyse(study.cells()).missing == ()
    with pytest.raises(SystemExit):
        main(["large-batch", "--folder", str(folder), "--epochs", "2"])
    error = capsys.readouterr().err
    assert "study.epochs 10 is not 2" in error
    assert "choose another --folder" in error
    held = cell_of("kfac", 32, [], [])
    study.save(held.model_copy(update={"environment": held.environment.model_copy(update={"code": "other"})}))
    with pytest.raises(ResultError, match=r"kfac-32.json' does not belong to .*code other is not"):
        study.cells()
    study.path(held).write_text("{")
    with pytest.raises(ResultError, match=r"kfac-32.json' is damaged"):
        study.cells()


def test_mistakes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, said in (
        (["--batch-sizes", "20000"], "a batch of 20000 is more than the 12933 training images"),
        (["--seeds", "0,1"], "the seed 1 chose the rates"),
        (["--optimizers", "lion"], "lion"),
        (["--report-only", "--folder", str(tmp_path)], "holds no cells"),
    ):
        with pytest.raises(SystemExit):
            main(["large-batch", *options])
        assert said in capsys.readouterr().err


def test_the_command_makes_what_is_missing_and_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["large-batch", "--folder", str(tmp_path), "--epochs", "1", "--batch-sizes", "4096",
               "--optimizers", "sgd", "--processes", "1"]  # fmt: skip
    # Rates that an earlier command has tried.
    empty = Cell.empty("sgd", 4096, StudySettings(epochs=1), environment())
    tried = cell_of("sgd", 4096, [0.3, 0.2, 0.4], []).tuning
    Study(tmp_path).save(empty.model_copy(update={"tuning": tried}))
    main([*options, "--seeds", "0"])
    said = capsys.readouterr().out
    assert "0 of 1 cells are there already" in said
    assert "1/1 sgd-4096: rate 1.92, held-out loss " in said
    assert "partial: without 9 of 10 epochs; sgd at 32, 64, 128, 256, 512, 1024, 2048; lars" in said
    written = (tmp_path / "cells" / "sgd-4096.json").stat().st_mtime_ns
    main([*options, "--seeds", "0"])
    assert "1 of 1 cells are there already" in capsys.readouterr().out
    assert (tmp_path / "cells" / "sgd-4096.json").stat().st_mtime_ns == written
    main(["large-batch", "--folder", str(tmp_path), "--report-only"])
    assert (tmp_path / "loss-against-batch-size.png").stat().st_size > 5_000
