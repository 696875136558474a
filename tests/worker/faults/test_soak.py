"""A short soak in real processes: faults were injected, versions were adopted, and no rule was broken."""

from __future__ import annotations

import json

import pytest

from history_story import good_story
from preconditioner_protos.history import Kind
from preconditioner_worker.cli import main

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
    said = capsys.readouterr().out
    assert "no violation" in said
    # What was kept can be judged again, and holds no secret.
    files = sorted((tmp_path / "kept").glob("*.jsonl"))
    main(["check-history", *map(str, files), "--matrices", str(tmp_path / "kept" / "matrices")])
    assert "no violation" in capsys.readouterr().out
    assert not any(b"token" in file.read_bytes().lower() for file in files)


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
