"""The measurement of an outage, on a small task and in seconds."""

from __future__ import annotations

import json

import pytest

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
    assert "p99 during / before" in " ".join(capsys.readouterr().out.split())
