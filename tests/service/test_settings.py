"""Precedence, unknown keys, and errors that name the way out and no secret."""

from __future__ import annotations

import os

import pytest
from pydantic import ValidationError
from pydantic_settings import CliApp, SettingsError

from preconditioner_service import cli, machine
from preconditioner_service.files import FileError
from preconditioner_service.machine import is_loopback
from preconditioner_service.settings import ServeSettings

SECRET = "hush-hush-51d2"


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    for name in [name for name in os.environ if name.upper().startswith("PRECONDITIONER_SERVICE_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def token(monkeypatch):
    monkeypatch.setenv("PRECONDITIONER_SERVICE_TOKEN", SECRET)


def parse(*arguments: str) -> ServeSettings:
    return CliApp.run(ServeSettings, cli_args=list(arguments))


def opens(settings: ServeSettings, token: str) -> bool:
    policy = settings.open_policy().value
    caller = policy.caller(f"Bearer {token}")
    return caller is not None and policy.opens(caller, "job")


@pytest.mark.usefixtures("token")
def test_precedence(monkeypatch, tmp_path):
    file = tmp_path / "service.toml"
    file.write_text("port = 1\nnum_workers = 1\ncredit_bytes = 2097152\n")
    monkeypatch.setenv("PRECONDITIONER_SERVICE_PORT", "2")
    monkeypatch.setenv("PRECONDITIONER_SERVICE_NUM_WORKERS", "2")
    settings = parse("--config", str(file), "--port", "3")
    assert (settings.port, settings.num_workers, settings.credit_bytes) == (3, 2, 2097152)
    assert settings.session_ttl == 60.0
    monkeypatch.setenv("PRECONDITIONER_SERVICE_CONFIG", str(file))
    assert parse().credit_bytes == 2097152


@pytest.mark.usefixtures("token")
def test_defaults():
    settings = parse()
    assert (settings.host, settings.port, settings.ray_address) == ("127.0.0.1", 0, None)
    assert settings.num_workers == machine.default_workers()
    assert opens(settings, SECRET)
    assert not opens(settings, "another")
    assert SECRET not in repr(settings)
    assert SECRET not in str(settings.model_dump())


@pytest.mark.usefixtures("token")
def test_unknown_keys_everywhere(monkeypatch, tmp_path):
    with pytest.raises((SettingsError, SystemExit)):
        parse("--prot", "1")
    file = tmp_path / "service.toml"
    file.write_text("prot = 1\n")
    with pytest.raises(ValidationError, match="prot"):
        parse("--config", str(file))
    monkeypatch.setenv("PRECONDITIONER_SERVICE_PROT", "1")
    with pytest.raises(SettingsError, match="PRECONDITIONER_SERVICE_PROT"):
        parse()


LINKS = {
    "SERVICE_HOST": "10.96.0.7",
    "SERVICE_PORT": "50051",
    "SERVICE_PORT_GRPC": "50051",
    "PORT": "tcp://10.96.0.7:50051",
    "PORT_50051_TCP": "tcp://10.96.0.7:50051",
    "PORT_50051_TCP_PROTO": "tcp",
    "PORT_50051_TCP_PORT": "50051",
    "PORT_50051_TCP_ADDR": "10.96.0.7",
}
"""What Kubernetes puts into every pod for a Service, after its name."""


@pytest.mark.usefixtures("token")
@pytest.mark.parametrize("service", ["PRECONDITIONER_SERVICE_", "PRECONDITIONER_SERVICE_GRPC_"])
def test_service_links_of_kubernetes_are_no_settings(monkeypatch, tmp_path, service):
    for name, value in LINKS.items():
        monkeypatch.setenv(service + name, value)
    assert parse().port == 0
    file = tmp_path / "service.toml"
    file.write_text("port = 7\n")
    assert parse("--config", str(file)).port == 7
    monkeypatch.setenv("PRECONDITIONER_SERVICE_SERVICE_HOTS", "x")
    with pytest.raises(SettingsError, match="PRECONDITIONER_SERVICE_SERVICE_HOTS"):
        parse()


@pytest.mark.usefixtures("token")
def test_the_links_of_a_service_called_preconditioner(monkeypatch):
    for name, value in LINKS.items():
        monkeypatch.setenv(f"PRECONDITIONER_{name}", value)
    settings = parse("--host", "127.0.0.1")
    assert settings.port == 50051, "cannot be told from a setting: deploy/README.md names the way out"


@pytest.mark.usefixtures("token")
@pytest.mark.parametrize("name", [name for name in LINKS if name != "PORT"])
def test_names_like_links_without_a_service_are_refused(monkeypatch, name):
    monkeypatch.setenv(f"PRECONDITIONER_SERVICE_{name}", LINKS[name])
    with pytest.raises(SettingsError, match=name):
        parse()


@pytest.mark.parametrize(
    ("arguments", "variables", "file", "told"),
    [
        ([], {"PORT": "x"}, "", "port (PRECONDITIONER_SERVICE_PORT): "),
        ([], {}, "port = 'x'", "port (FILE): "),
        (["--port", "x"], {"PORT": "1"}, "port = 2", "port: "),
        ([], {"PORT": "x"}, "port = 2", "port (PRECONDITIONER_SERVICE_PORT): "),
        ([], {}, "prot = 1", "prot (FILE): unknown setting (did you mean port?)"),
        ([], {"MAX_SIDES": "1"}, "", "(did you mean PRECONDITIONER_SERVICE_MAX_SIDE?)"),
        (["--max-sides", "1"], {}, "", "(did you mean --max-side?)"),
        (
            [],
            {},
            "token_file = 'x'",
            "(token is set by PRECONDITIONER_SERVICE_TOKEN, token_file is set by FILE)",
        ),
        ([], {}, "zebra = 1", "zebra (FILE): unknown setting"),
    ],
)
@pytest.mark.usefixtures("token")
def test_errors_say_where_a_setting_came_from(
    monkeypatch, tmp_path, capsys, arguments, variables, file, told
):
    path = tmp_path / "service.toml"
    path.write_text(file)
    for name, value in variables.items():
        monkeypatch.setenv(f"PRECONDITIONER_SERVICE_{name}", value)
    assert cli.main(["serve", "--config", str(path), *arguments]) == 2
    error = capsys.readouterr().err
    assert told.replace("FILE", str(path)) in error
    assert SECRET not in error
    assert "zebra" not in error or "did you mean" not in error


@pytest.mark.usefixtures("token")
def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(SettingsError, match=r"nowhere\.toml"):
        parse("--config", str(tmp_path / "nowhere.toml"))
    file = tmp_path / "broken.toml"
    file.write_text("port 1\n")
    with pytest.raises(SettingsError, match=r"broken\.toml"):
        parse("--config", str(file))


@pytest.mark.parametrize(
    ("token", "why"), [(" ", "empty"), ("a b", "white space"), ("a\nb", "several lines")]
)
def test_tokens_that_are_none(monkeypatch, token, why):
    monkeypatch.setenv("PRECONDITIONER_SERVICE_TOKEN", token)
    with pytest.raises(ValidationError, match=why):
        parse()


def test_a_token_is_needed_and_one_only(monkeypatch, tmp_path):
    with pytest.raises(ValidationError, match="PRECONDITIONER_SERVICE_TOKEN"):
        parse()
    file = tmp_path / "token"
    file.write_text(f"{SECRET}\n")
    assert opens(parse("--token-file", str(file)), SECRET)
    with pytest.raises(FileError, match="missing"):
        parse("--token-file", str(tmp_path / "missing")).open_policy()
    file.write_text("\n")
    with pytest.raises(FileError, match="empty"):
        parse("--token-file", str(file)).open_policy()
    with pytest.raises(ValidationError, match="one of token, token_file and jobs_file"):
        parse("--token-file", str(file), "--jobs-file", str(file))
    monkeypatch.setenv("PRECONDITIONER_SERVICE_TOKEN", SECRET)
    with pytest.raises(ValidationError, match="one of token, token_file and jobs_file") as caught:
        parse("--token-file", str(file))
    assert SECRET not in str(caught.value)


@pytest.mark.usefixtures("token")
def test_off_loopback_needs_tls_or_the_flag(tmp_path):
    with pytest.raises(ValidationError, match="--allow-plaintext") as caught:
        parse("--host", "0.0.0.0")
    assert SECRET not in str(caught.value)
    assert parse("--host", "0.0.0.0", "--allow-plaintext").allow_plaintext
    parse("--host", "0.0.0.0", "--tls-cert", str(tmp_path), "--tls-key", str(tmp_path))


@pytest.mark.usefixtures("token")
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--tls-cert", "c.pem"), "tls_key"),
        (("--tls-client-ca", "c.pem"), "tls_cert"),
        (("--ray-address", "ray://head:10001"), "Ray Client"),
        (("--port", "70000"), "port"),
        (("--num-workers", "0"), "num_workers"),
        (("--session-ttl", "inf"), "session_ttl"),
        (("--session-ttl", "-1"), "session_ttl"),
        (("--max-message-bytes", "1000"), "max_message_bytes"),
        (("--log-level", "loud"), "log_level"),
        (("--worker-nice", "20"), "worker_nice"),
    ],
)
def test_values_out_of_range(arguments, named):
    with pytest.raises(ValidationError, match=named):
        parse(*arguments)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("localhost", True),
        ("::1", True),
        ("[::1]", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("localhost.example.org", False),
    ],
)
def test_is_loopback(host, expected):
    assert is_loopback(host) is expected
