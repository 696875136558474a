"""The command line: exit statuses, and one line of JSON for whoever started it."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography import x509

from preconditioner_service import cli, tokens


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


@pytest.mark.parametrize("words", [("--tokn", "hush-secret"), ("--tokn=hush-secret",), ("--tokn", "-x hush")])
def test_values_of_unknown_options_are_not_shown(words, capsys):
    assert cli.main(["serve", *words]) == 2
    captured = capsys.readouterr()
    assert "hush" not in captured.out + captured.err
    assert "unrecognized arguments: --tokn (did you mean --token?)" in captured.err
    assert "unrecognized arguments: --tokn" in captured.out


def test_words_of_no_option_are_not_shown(capsys):
    assert cli.main(["serve", "hush-secret"]) == 2
    reason = failed(capsys)
    assert "unrecognized arguments: words that belong to no option" in reason
    assert "hush" not in reason


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["serve", "--no-reflection", "--max-sides", "3"], "--max-sides (did you mean --max-side?)"),
        (["status", "host:1", "--json", "--token-fil", "x"], "--token-fil (did you mean --token-file?)"),
        (["status", "--address", "x:1", "y:1", "--token-file", "x"], "unrecognized arguments: --address"),
    ],
)
def test_only_what_is_wrong_is_listed_with_what_was_meant(arguments, told, capsys):
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("did you mean") == told.count("did you mean")
    assert "--no-reflection" not in error
    assert "--json" not in error


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
    assert "install async-preconditioner[service] from its checkout or wheel" in failed(capsys)


def test_options_have_their_help():
    shown = subprocess.run(
        [sys.executable, "-m", "preconditioner_service", "serve", "--help"], capture_output=True, text=True
    )
    assert shown.returncode == 0
    for option in ("--ray-address", "--num-workers", "--parent-pid", "--allow-plaintext", "--drain-grace"):
        assert option in shown.stdout


@pytest.mark.parametrize("command", ["serve", "health", "status", "token", "certs"])
def test_help_is_for_people(command, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert not [word for word in ("lambda", "factory", "list[", "Annotated") if word in shown]
    options = shown.partition("options:")[2]
    for option in re.findall(r"^  (--\S+.*(?:\n {4,}.*)*)", options, re.MULTILINE):
        words = option.partition("(")[0].split()
        assert len([word for word in words if not word.startswith("--")]) > 2, option


def test_a_token_is_made_in_a_file_and_its_digest_printed(tmp_path, capsys):
    path = tmp_path / "job.token"
    assert cli.main(["token", str(path)]) == 0
    made = capsys.readouterr().out
    assert path.stat().st_mode & 0o777 == 0o600
    (token,) = path.read_text().splitlines()
    assert made == f"{tokens.show(tokens.digest(token))}\n"
    assert cli.main(["token", str(path), "--digest"]) == 0
    assert capsys.readouterr().out == made
    assert cli.main(["token", str(path)]) == 1
    assert "nothing is overwritten" in capsys.readouterr().err
    assert path.read_text() == f"{token}\n"


def test_certificates_are_made_for_the_hosts_that_are_named(tmp_path, capsys):
    directory = tmp_path / "certs"
    hosts = ["--host", "service.example", "--host", "10.0.0.7"]
    assert cli.main(["certs", str(directory), *hosts]) == 0
    written = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(written) == sorted(directory.iterdir())
    server = x509.load_pem_x509_certificate((directory / "server.pem").read_bytes())
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["service.example"]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.7"]
    assert cli.main(["certs", str(directory), *hosts]) == 1
    assert "nothing is overwritten" in capsys.readouterr().err


def test_options_that_may_be_repeated_are_named_by_what_they_take_once(capsys):
    with pytest.raises(SystemExit):
        cli.main(["certs", "--help"])
    assert "--host HOST " in capsys.readouterr().out


def test_the_commands_import_nothing_that_no_extra_names():
    for module in ("cli", "command", "commands", "mistakes"):
        text = (Path(cli.__file__).parent / f"{module}.py").read_text()
        assert "typing_extensions" not in text


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
