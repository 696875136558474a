"""A short soak in real processes: faults were injected, versions were adopted, and no rule was broken."""

from __future__ import annotations

import json

import pytest

from history_story import good_story
from preconditioner_protos.history import Event, HistoryRecorder, Kind, Scope
from preconditioner_worker.cli import main
from preconditioner_worker.faults import commands
from preconditioner_worker.faults.soak import Result, adopted_since, shortfalls

SECONDS = 6


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_a_short_soak_breaks_no_rule(tmp_path, capsys):
    arguments = ["--folder", str(tmp_path / "kept"), "--json", str(tmp_path / "result.json")]
    main(["soak", "--minutes", str(SECONDS / 60), "--seed", "2", *arguments])
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["violations"] == []
    assert result["folder"] == str(tmp_path / "kept")
    assert sum(result["faults"].values()) >= 3
    assert min(result["adopted"], result["steps"], result["roots_computed"]) > 0
    assert result["shortfalls"] == []
    assert result["looked_at"]["recovery"] == 2
    said = capsys.readouterr().out
    assert "no violation" in said
    # What was kept can be judged again, and holds no secret.
    files = sorted((tmp_path / "kept").glob("*.jsonl"))
    main(["check-history", *map(str, files), "--matrices", str(tmp_path / "kept" / "matrices")])
    assert "no violation" in capsys.readouterr().out
    assert not any(b"token" in file.read_bytes().lower() for file in files)


LOOKED_AT = {"waits": 700, "recovery": 2, "schedule": 20}


@pytest.mark.parametrize(
    ("minutes", "looked_at", "reasons"),
    [
        (0.7, {}, []),
        (0.8, {}, ["7 faults in 0.8 minutes; at least 10 a minute are due"]),
        (0.1, {"recovery": 1}, ["check recovery looked at 1 of 2 jobs"]),
        (
            0.1,
            {"recovery": 0, "schedule": 0},
            ["check recovery looked at nothing", "check schedule looked at nothing"],
        ),
    ],
)
def test_what_was_not_put_to_the_test_is_named(minutes, looked_at, reasons):
    assert shortfalls(minutes, {"partition": 4, "service killed": 3}, LOOKED_AT | looked_at) == reasons


@pytest.mark.parametrize("lacking", [[], ["check recovery looked at nothing"]])
def test_a_verdict_that_proves_too_little_is_told_by_the_exit_status(monkeypatch, tmp_path, capsys, lacking):
    result = Result(
        seed=0, seconds=60.0, faults={"partition": 12, "slow reader": 0}, steps=9, adopted=9, waits=0,
        lives={"eager": 1}, roots_computed=9, looked_at=LOOKED_AT, holes=0, shortfalls=lacking,
    )  # fmt: skip
    monkeypatch.setattr(commands, "soak", lambda *_, **__: result)
    status = 0
    try:
        main(["soak", "--json", str(tmp_path / "result.json")])
    except SystemExit as stopped:
        status = stopped.code
    assert status == len(lacking)
    said = capsys.readouterr().out
    assert "12 faults of 1 kinds in 60 s" in said
    assert ("proves too little: check recovery looked at nothing" in said) == bool(lacking)
    assert json.loads((tmp_path / "result.json").read_text())["shortfalls"] == lacking


def test_an_adoption_from_before_is_none_however_late_it_is_written(tmp_path):
    path = tmp_path / "trainer.jsonl"
    assert not adopted_since(path, 0.0)
    recorder = HistoryRecorder(path, "trainer")
    recorder.record(Kind.ADOPTED, Scope("job", 0, 1), block=0, version=3, step=4, digests=None)
    recorder.close()
    events = [Event.parse(line) for line in path.read_bytes().splitlines()]
    (adopted,) = (event for event in events if event.kind is Kind.ADOPTED)
    assert adopted_since(path, adopted.at)
    assert not adopted_since(path, adopted.at + 1e-6)
    # It begins in the middle of a line and ends so.
    path.write_bytes(b'0,"kind":"trainer.adopted"}\n' + adopted.line() + adopted.line()[:-9])
    assert adopted_since(path, adopted.at, offset=1)


def test_a_folder_of_another_run_is_refused(tmp_path, capsys):
    (tmp_path / "old.jsonl").touch()
    with pytest.raises(SystemExit) as stopped:
        main(["soak", "--folder", str(tmp_path)])
    assert stopped.value.code == 2
    assert "soak.folder: Value error, the folder must be new or empty" in capsys.readouterr().err


def test_files_that_cannot_be_judged_are_named(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"v":1,"kind":"nothing"}\n')
    with pytest.raises(SystemExit) as stopped:
        main(["check-history", str(tmp_path / "a.jsonl")])
    assert stopped.value.code == 1
    assert "a.jsonl, line 1: unknown kind 'nothing'" in capsys.readouterr().err


def test_a_result_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "matrices").mkdir()
    files = [str(path) for path in good_story(tmp_path / "matrices").write(tmp_path)]
    with pytest.raises(SystemExit) as stopped:
        main(["check-history", *files, "--json", str(tmp_path / "matrices")])
    assert stopped.value.code == 1
    assert f"cannot write '{tmp_path / 'matrices'}': Is a directory" in capsys.readouterr().err


def test_a_broken_rule_is_shown_and_told_by_the_exit_status(tmp_path, capsys):
    (tmp_path / "matrices").mkdir()
    story = good_story(tmp_path / "matrices")
    story.change(story.find(Kind.STEP_ENDED, step=5), data={"used": [1]})
    files = [str(path) for path in story.write(tmp_path)]
    with pytest.raises(SystemExit) as stopped:
        main(["check-history", *files, "--json", str(tmp_path / "found.json")])
    assert stopped.value.code == 1
    assert "rule 3 (diagonal): the blocks [1] were preconditioned" in capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["violations"][0]["check"] == "diagonal"
    assert found["looked_at"]["adoption"] > 0
