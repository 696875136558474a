"""The measurement of an outage, on a small task and in seconds."""

from __future__ import annotations

import json

import pytest

from preconditioner_worker import bench_outage
from preconditioner_worker.bench_outage import OutageBenchmark, Window
from preconditioner_worker.cli import main


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_the_command_prints_what_an_outage_costs(tmp_path, capsys):
    target = tmp_path / "outage.json"
    main(
        [
            "bench",
            "outage",
            "--workload",
            "digits",
            "--seconds",
            "3",
            "--how",
            "freeze",
            # Three seconds beside other tests say nothing about a percentile.
            "--bound",
            "1000",
            "--json",
            str(target),
        ]
    )
    result = json.loads(target.read_text())
    names = [window["name"] for window in result["windows"]]
    assert names == ["before", "before, first half", "before, second half", "during the outage"]
    assert all(window["steps"] > 10 and window["p99_ms"] > 0 for window in result["windows"])
    assert result["p99_ratio"] > 0
    assert result["waits"] == 0
    assert 0 < result["age_max"] <= result["max_staleness"]
    assert result["seconds_to_fresh"] < 60
    said = " ".join(capsys.readouterr().out.split())
    assert "p99 during / before" in said
    assert said.endswith("holds")


@pytest.mark.parametrize(
    ("ratio", "waits", "options", "verdict"),
    [
        (1.05, 0, [], "holds"),
        (1.06, 0, [], "does not hold: the steps' p99 during / before is 1.06, the bound is 1.05"),
        (1.06, 0, ["--bound", "1.1"], "holds"),
        (0.9, 3, [], "does not hold: 3 steps waited"),
        (float("nan"), 0, [], "does not hold: the steps' p99 during / before is nan, the bound is 1.05"),
    ],
)
def test_the_verdict_is_told_by_the_exit_status(
    monkeypatch, tmp_path, capsys, ratio, waits, options, verdict
):
    window = Window(name="before", steps=20, median_ms=1.0, p99_ms=2.0, slowest_ms=2.0)
    result = OutageBenchmark(
        workload="digits", how="kill", seconds=60, torch="", threads=1, windows=[window], p99_ratio=ratio,
        noise_ratio=1.0, waits=waits, max_staleness=100, age_max=3, seconds_to_fresh=1.0,
    )  # fmt: skip
    monkeypatch.setattr(bench_outage, "benchmark", lambda *_, **__: result)
    target = tmp_path / "outage.json"
    status = 0
    try:
        main(["bench", "outage", "--workload", "digits", "--json", str(target), *options])
    except SystemExit as stopped:
        status = stopped.code
    assert status == (verdict != "holds")
    assert capsys.readouterr().out.splitlines()[-1] == verdict
    assert target.exists(), "a result that does not hold is kept, too"
