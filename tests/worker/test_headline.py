"""The headline: what it says of results, and that the committed one is of the committed results."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
from pydantic_settings import CliApp

from preconditioner_worker.application import Application
from preconditioner_worker.headline import Results, markdown, write_headline
from preconditioner_worker.results import ResultError
from preconditioner_worker.staleness.analysis import Analysis
from preconditioner_worker.staleness.criteria import Verdict

COMMITTED = Path(__file__).parents[2] / "worker" / "results"


@pytest.fixture
def results() -> Results:
    return Results.load(COMMITTED)


def goals(results: Results) -> list[str]:
    text = markdown(results)
    part = text[text.index("## Goals") : text.index("## Every optimizer")]
    return [line for line in part.splitlines() if line.startswith("- ")]


def test_the_committed_headline_comes_from_the_committed_results(tmp_path: Path) -> None:
    made = write_headline(COMMITTED, tmp_path / "headline.md")
    assert made.read_text() == (COMMITTED / "README.md").read_text()


def test_every_optimizer_of_every_comparison_has_a_line(results: Results) -> None:
    text = markdown(results)
    for workload, comparison in results.comparisons.items():
        section = text[text.index(f"### {workload}") :]
        for row in comparison.rows:
            assert f"| {row.label} |" in section


def test_a_goal_that_is_missed_says_by_how_much(results: Results) -> None:
    slow = results.demo.model_copy(update={"steps_ratio": 0.61, "wall_ratio": None})
    steps, wall, *_ = goals(results.model_copy(update={"demo": slow}))
    assert "not reached by 0.100, 0.610" in steps
    assert "not reached" in wall
    fast = results.demo.model_copy(update={"steps_ratio": 0.51, "wall_ratio": 0.6})
    steps, wall, *_ = goals(results.model_copy(update={"demo": fast}))
    assert "**reached**, 0.510" in steps
    assert "**reached**, 0.600" in wall


def with_verdict(results: Results, verdict: Verdict, least: int = 2) -> Results:
    """The same, the first study's A(N) with this verdict from ``least`` on, and no other study."""
    folder, study, part = results.arms[0]
    rows = tuple(
        row if (row.n or 0) < least else row.model_copy(update={"verdict": verdict}) for row in part.rows
    )
    changed = part.model_copy(update={"rows": rows})
    parts = tuple(changed if other is part else other for other in study.parts)
    return results.model_copy(update={"studies": {folder: study.model_copy(update={"parts": parts})}})


def test_the_goal_of_the_delay_is_reached_where_every_n_holds(results: Results) -> None:
    assert "**reached** on text, 12,000 steps" in goals(with_verdict(results, Verdict.HOLDS))[3]
    assert "not reached" in goals(with_verdict(results, Verdict.INCONCLUSIVE))[3]
    alone = goals(with_verdict(with_verdict(results, Verdict.INCONCLUSIVE), Verdict.HOLDS, 1200))[3]
    assert "it does on text, 12,000 steps, where some smaller N before it is not shown to" in alone
    assert "reached" not in alone
    both = results.model_copy(
        update={"studies": {name: study for one in Verdict for name, study in named(results, one)}}
    )
    assert "**reached** on text, 12,000 steps" in goals(both)[3]


def named(results: Results, verdict: Verdict) -> list[tuple[str, Analysis]]:
    return [(f"{verdict.value}", study) for study in with_verdict(results, verdict).studies.values()]


def test_divergence_is_counted(results: Results) -> None:
    name, comparison = next(iter(results.comparisons.items()))
    last = comparison.rows[-1].model_copy(update={"diverged": 2, "final_loss": math.inf})
    changed = comparison.model_copy(update={"rows": [*comparison.rows[:-1], last]})
    line = goals(results.model_copy(update={"comparisons": {name: changed}}))[2]
    assert f"2 of {sum(row.seeds for row in comparison.rows)} runs diverged, on {name}" in line


def test_what_is_missing_is_named(tmp_path: Path, results: Results) -> None:
    with pytest.raises(ResultError, match="compare' holds no comparison"):
        Results.load(tmp_path)
    shutil.copytree(COMMITTED / "compare", tmp_path / "compare")
    with pytest.raises(ResultError, match="holds no study of staleness"):
        Results.load(tmp_path)
    shutil.copytree(COMMITTED / "staleness", tmp_path / "staleness")
    with pytest.raises(ResultError, match=r"summary\.json"):
        Results.load(tmp_path)


def test_the_command_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "headline.md"
    CliApp.run(Application, cli_args=["headline", f"--results={COMMITTED}", f"--output={output}"])
    assert output.read_text().startswith("# What is published")
    assert str(output) in capsys.readouterr().out.replace("\n", "")
