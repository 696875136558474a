"""The command line: exit statuses, and one line of JSON for whoever started it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest

from preconditioner_service import cli


@pytest.fixture(autouse=True)
def _token(monkeypatch):
    monkeypatch.setenv("PRECONDITIONER_SERVICE_TOKEN", "hush")


def failed(capsys) -> str:
    """The reason of the failed line."""
    captured = capsys.readouterr()
    (line,) = captured.out.splitlines()
    entry = json.loads(line)
    assert entry["event"] == "failed"
    assert entry["reason"] in captured.err
    return entry["reason"]


@pytest.mark.parametrize("arguments", [[], ["sevre"]])
def test_wrong_commands(arguments, capsys):
    assert cli.main(arguments) == 2
    assert "usage:" in capsys.readouterr().err


def test_help(capsys):
    assert cli.main(["--help"]) == 0
    assert "bench" in capsys.readouterr().out


def test_unknown_options_are_named(capsys):
    assert cli.main(["serve", "--prot", "1"]) == 2
    assert "--prot" in failed(capsys)


def test_wrong_values_are_named_without_the_value_of_secrets(capsys):
    assert cli.main(["serve", "--port", "x", "--host", "0.0.0.0"]) == 2
    reason = failed(capsys)
    assert "port" in reason
    assert "hush" not in reason


def test_no_token(monkeypatch, capsys):
    monkeypatch.delenv("PRECONDITIONER_SERVICE_TOKEN")
    assert cli.main(["serve"]) == 2
    assert "--token-file" in failed(capsys)


def test_extras_that_are_not_installed(monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else found(name))
    assert cli.main(["serve"]) == 1
    assert "pip install 'async-preconditioner[service]'" in failed(capsys)


def test_options_have_their_help():
    shown = subprocess.run(
        [sys.executable, "-m", "preconditioner_service", "serve", "--help"], capture_output=True, text=True
    )
    assert shown.returncode == 0
    for option in ("--ray-address", "--num-workers", "--parent-pid", "--allow-plaintext", "--drain-grace"):
        assert option in shown.stdout


def test_bench_hands_over_to_the_benchmarks(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["bench", "--help"])
    assert caught.value.code == 0
    assert "usage: preconditioner-service bench" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        cli.main(["bench", "nothing"])
    assert caught.value.code == 2


def test_the_server_imports_nothing_that_computes():
    code = (
        "import sys, preconditioner_service.serve; "
        "print([m for m in ('torch', 'ray', 'scipy', 'preconditioner_client', 'preconditioner_worker') "
        "if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
