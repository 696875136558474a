"""The picture is written, also for runs that diverge or have no ages."""

from __future__ import annotations

import math
import struct

import pytest

from preconditioner_worker.comparison import compare
from preconditioner_worker.plots import Curve, draw


def size(path):
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    return struct.unpack(">II", data[16:24])


def test_curves_with_ages_are_wider(make_run, tmp_path):
    adamw, shampoo = make_run("adamw", [3.0, 2.5, 2.0]), make_run("shampoo", [2.0, 1.9])
    runs = [adamw, shampoo]
    wide = size(draw(runs, tmp_path / "new" / "curves.png", comparison=compare(runs, "adamw")))
    narrow = size(draw([adamw], tmp_path / "one.png"))
    assert wide[0] > narrow[0] > 800


@pytest.mark.filterwarnings("error")
def test_diverged_and_tiny_runs_are_drawn(make_run, tmp_path):
    runs = [make_run("adamw", [2.0]), make_run("sgd", [3.0, math.nan]), make_run("adagrad", [math.nan])]
    size(draw(runs, tmp_path / "curves.png", comparison=compare(runs, "adamw")))


def test_seeds_are_one_curve_of_their_medians(make_run):
    seeds = [make_run("sgd", losses, seed=n) for n, losses in enumerate([[3.0, 2.0], [5.0, 1.0], [4.0, 1.5]])]
    curve = Curve.of(seeds)
    assert curve.median.tolist() == [4.0, 1.5]
    assert curve.least.tolist() == [3.0, 1.0]
    assert curve.greatest.tolist() == [5.0, 2.0]
    assert curve.name == "sgd"


def test_a_seed_that_diverged_is_infinite_from_there_on(make_run):
    seeds = [make_run("sgd", losses, seed=n) for n, losses in enumerate([[3.0, 2.0], [math.nan], [4.0, 1.5]])]
    curve = Curve.of(seeds)
    assert curve.median.tolist() == [4.0, 2.0]
    assert curve.greatest.tolist() == [math.inf, math.inf]
    assert curve.name == "sgd (1 diverged)"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("ends", [[0.001, 0.5], [0.3, 0.5]])
def test_many_optimizers_have_their_legend_beside_the_picture(make_run, tmp_path, ends):
    labels = ["adamw", "sgd", "adagrad", "lamb", "lars"]
    runs = [make_run(label, [3.0, ends[i % 2]], seed=s) for i, label in enumerate(labels) for s in (0, 2)]
    few = [run for run in runs if run.settings.label in labels[:2]]
    many = size(draw(runs, tmp_path / "many.png", comparison=compare(runs, "adamw")))
    assert many[0] > size(draw(few, tmp_path / "few.png", comparison=compare(few, "adamw")))[0]
