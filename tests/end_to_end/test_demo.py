"""The demonstration in a very short form, with the service it starts for itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "preconditioner_worker.cli", "demo",
         "--steps-adamw", "15", "--steps-shampoo", "60", "--evaluate-every", "15"],
        cwd=tmp_path, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    folder = tmp_path / "runs" / "demo"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps_adamw"] == 15
    assert summary["steps_shampoo"] in (15, 30, 45, 60)
    assert summary["steps_ratio"] == summary["steps_shampoo"] / 15
    assert summary["target_loss"] == summary["final_loss"]["adamw"]
    assert summary["wall_ratio"] > 0
    assert summary["versions_adopted"] > summary["blocks"] > 0
    assert 0 < summary["age_max"] <= summary["max_staleness"]
    assert summary["waits"] == 0
    assert set(summary["step_ms"]) == {"adamw", "shampoo"}
    for times in summary["step_ms"].values():
        assert 0 < times["median"] <= times["p99"]
    assert (folder / "curves.png").stat().st_size > 10_000
    assert "steps" in finished.stdout
    assert "curves.png" in finished.stdout
