"""Work over several processes: side by side, all of it, and with a clear end where one is killed."""

from __future__ import annotations

import io
import os
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

from parallel_works import answer, die, meet
from preconditioner_worker.parallel import Work, execute
from preconditioner_worker.results import ResultError


def run(works: list[Work[str]], processes: int) -> tuple[list[str], str]:
    """What the works gave, and what was printed."""
    ended: list[str] = []

    def done(result: str) -> str:
        ended.append(result)
        return "over"

    printed = io.StringIO()
    execute(works, unit="runs", processes=processes, console=Console(file=printed), done=done)
    return ended, printed.getvalue()


def test_two_are_under_way_at_a_time_in_processes_of_their_own(tmp_path: Path) -> None:
    works = [
        Work("first", 2, partial(meet, tmp_path, "a", "b")),
        Work("second", 2, partial(meet, tmp_path, "b", "a")),
    ]
    ended, printed = run(works, 2)
    assert {text.split(" in ")[0] for text in ended} == {"a met b", "b met a"}
    processes = {text.rsplit(" ", 1)[1] for text in ended}
    assert len(processes) == 2
    assert str(os.getpid()) not in processes
    assert "2/2 " in printed


def test_more_works_than_processes_are_all_done() -> None:
    ended, printed = run([Work("one of five", 1, partial(answer, n)) for n in range(5)], 2)
    assert sorted(text[0] for text in ended) == ["0", "1", "2", "3", "4"]
    assert "5/5 one of five: over" in printed


def test_a_process_that_is_killed_is_told() -> None:
    with pytest.raises(ResultError, match="a process of the study was killed"):
        run([Work("killed", 1, die)], 1)
