"""The picture is written, also for runs that diverge or have no ages."""

from __future__ import annotations

import math
import struct

import pytest

from preconditioner_worker.comparison import compare
from preconditioner_worker.plots import draw


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
