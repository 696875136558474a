from __future__ import annotations

import sys

import pytest

from preconditioner_client.service_config import ServiceConfig

TLS_OFF_LOOPBACK = "10.0.0.7:50051"


def resolve(argument=None, **environ) -> ServiceConfig:
    return ServiceConfig.resolve(argument, environ)


def test_default_is_embedded():
    assert resolve() == ServiceConfig()
    assert resolve().embedded
    assert not resolve("localhost:1").embedded


def test_precedence(tmp_path):
    path = tmp_path / "client.json"
    path.write_text('{"address": "localhost:1", "job": "from-file", "connect_timeout": 2, "workers": 3}')
    file = {"PRECONDITIONER_CLIENT_CONFIG": str(path)}
    assert resolve(**file) == ServiceConfig(
        address="localhost:1", job="from-file", connect_timeout=2, workers=3
    )
    both = {**file, "PRECONDITIONER_SERVICE": "localhost:2", "PRECONDITIONER_CLIENT_JOB": "from-environment"}
    config = resolve(**both)
    assert (config.address, config.job, config.workers) == ("localhost:2", "from-environment", 3)
    config = resolve("localhost:3", **both)
    assert (config.address, config.job) == ("localhost:3", "from-environment")
    config = resolve(ServiceConfig(address="localhost:4", job="from-argument"), **both)
    assert (config.address, config.job, config.workers) == ("localhost:4", "from-argument", 3)
    assert resolve("embedded", **both).embedded


def test_an_argument_s_token_hides_the_environment_s_token_file(tmp_path):
    environ = {"PRECONDITIONER_TOKEN_FILE": str(tmp_path / "token")}
    assert resolve(ServiceConfig(address="localhost:1", token="mine"), **environ).token_file is None
    assert resolve("localhost:1", **environ).token_file == environ["PRECONDITIONER_TOKEN_FILE"]
    with pytest.raises(ValueError, match="token and token_file exclude each other"):
        resolve(PRECONDITIONER_TOKEN="a", **environ)


def test_every_field_can_be_set_by_environment():
    config = resolve(
        PRECONDITIONER_SERVICE=TLS_OFF_LOOPBACK,
        PRECONDITIONER_TOKEN="secret",
        PRECONDITIONER_CLIENT_ALLOW_PLAINTEXT="yes",
        PRECONDITIONER_CLIENT_CLOSE_TIMEOUT="1.5",
        PRECONDITIONER_CLIENT_OUTBOX_BYTES="1000",
    )
    assert config == ServiceConfig(
        address=TLS_OFF_LOOPBACK, token="secret", allow_plaintext=True, close_timeout=1.5, outbox_bytes=1000
    )


@pytest.mark.skipif(sys.version_info < (3, 11), reason="TOML needs tomllib")
def test_toml(tmp_path):
    path = tmp_path / "client.toml"
    path.write_text('address = "localhost:1"\ntls = true\n')
    assert resolve(PRECONDITIONER_CLIENT_CONFIG=str(path)) == ServiceConfig(address="localhost:1", tls=True)


def test_toml_on_an_older_python_says_what_to_do(tmp_path, monkeypatch):
    path = tmp_path / "client.toml"
    path.write_text("")
    monkeypatch.setattr(sys, "version_info", (3, 10, 0))
    with pytest.raises(ValueError, match="TOML needs Python 3"):
        resolve(PRECONDITIONER_CLIENT_CONFIG=str(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '{"adress": "localhost:1"}', "unknown key 'adress'; known are address, token"),
        ("a.json", '{"workers": "two"}', "workers must be of type int; 'two' is not"),
        ("a.json", '{"workers": true}', "workers must be of type int; True is not"),
        ("a.json", '{"token": 12345}', "token must be of type str; the value is not"),
        ("a.json", "[1]", "no table of settings"),
        ("a.json", "{", "a.json"),
        ("a.ini", "", r"must end in \.toml or \.json"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        resolve(PRECONDITIONER_CLIENT_CONFIG=str(path))
    assert "PRECONDITIONER_CLIENT_CONFIG" in str(caught.value)
    assert "12345" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        resolve(PRECONDITIONER_CLIENT_CONFIG=str(tmp_path / "none.json"))


def test_unknown_and_bad_variables_are_named():
    with pytest.raises(ValueError, match=r"unknown variable PRECONDITIONER_CLIENT_ADRESS; known are"):
        resolve(PRECONDITIONER_CLIENT_ADRESS="x")
    with pytest.raises(ValueError, match="PRECONDITIONER_CLIENT_WORKERS='many' is not valid"):
        resolve(PRECONDITIONER_CLIENT_WORKERS="many")
    with pytest.raises(ValueError, match="CLIENT_TLS='maybe' is not valid: it is none of 1, true"):
        resolve(PRECONDITIONER_CLIENT_TLS="maybe")


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("PRECONDITIONER_TOKN", "PRECONDITIONER_TOKEN"),
        ("PRECONDITIONER_ADDRESS", "PRECONDITIONER_SERVICE"),
        ("PRECONDITIONER_SERVCE", "PRECONDITIONER_SERVICE"),
        ("PRECONDITIONER_JOB", "PRECONDITIONER_CLIENT_JOB"),
        ("PRECONDITIONER_CLIENT_WORKER", "PRECONDITIONER_CLIENT_WORKERS"),
        ("PRECONDITIONER_PORT", None),
    ],
)
def test_a_variable_of_no_component_is_an_error_with_near_names(variable, meant):
    with pytest.raises(ValueError, match=f"unknown variable {variable}; known are") as caught:
        resolve(**{variable: "50051"})
    assert (meant is None) == ("meant?" not in str(caught.value))
    assert meant is None or f"Was {meant}" in str(caught.value)


SERVICE_LINKS = {
    "SERVICE_HOST": "10.0.0.1",
    "SERVICE_PORT": "50051",
    "SERVICE_PORT_GRPC": "50051",
    "PORT": "tcp://10.0.0.1:50051",
    "PORT_50051_TCP": "tcp://10.0.0.1:50051",
    "PORT_50051_TCP_PROTO": "tcp",
    "PORT_50051_TCP_PORT": "50051",
    "PORT_50051_TCP_ADDR": "10.0.0.1",
}


@pytest.mark.parametrize("service", ["", "SERVICE_", "CLIENT_", "TEAM_A_"])
def test_what_kubernetes_and_other_components_set_is_no_error(service):
    links = {f"PRECONDITIONER_{service}{name}": value for name, value in SERVICE_LINKS.items()}
    others = {"PRECONDITIONER_SERVICE_LOG_LEVEL": "debug", "PRECONDITIONER_WORKER_TRAIN__STEPS": "3"}
    assert resolve(**links, **others) == ServiceConfig()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("", "address is empty"),
        ("localhost", "'localhost' has no port"),
        ("localhost:", "the port ''"),
        (":50051", "has no port"),
        ("localhost:http", "the port 'http'"),
        ("localhost:0", "the port '0'"),
        ("localhost:70000", "the port '70000'"),
        ("::1:50051", "has no port"),
        ("http://localhost:1", "has a scheme"),
    ],
)
def test_a_bad_address_is_named_with_the_way_out(address, message):
    with pytest.raises(ValueError, match=message) as caught:
        resolve(address)
    assert 'give "embedded" or "host:port"' in str(caught.value)


@pytest.mark.parametrize("address", ["localhost:1", "127.0.0.1:1", "127.9.9.9:1", "[::1]:65535"])
def test_loopback_needs_no_tls(address):
    assert ServiceConfig(address=address).address == address


@pytest.mark.parametrize(
    "address", [TLS_OFF_LOOPBACK, "service.example:1", "[2001:db8::1]:1", "localhost.evil:1"]
)
def test_off_loopback_needs_tls_or_a_word(address):
    with pytest.raises(ValueError, match=r"not on loopback.*tls=True.*allow_plaintext=True"):
        ServiceConfig(address=address)
    ServiceConfig(address=address, allow_plaintext=True)
    ServiceConfig(address=address, tls=True)
    assert ServiceConfig(address=address, tls_ca="ca.pem").tls


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tls_cert": "a"}, "both tls_cert and tls_key"),
        ({"job": "a b"}, "job 'a b'"),
        ({"connect_timeout": 0}, "connect_timeout must be finite and > 0 seconds, not 0"),
        ({"close_timeout": float("inf")}, "close_timeout must be finite"),
        ({"workers": 0}, "workers must be >= 1, not 0"),
        ({"token": ""}, "token holds an empty token"),
        ({"token": "two words"}, "token holds white space"),
    ],
)
def test_bad_values_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        ServiceConfig(**settings)


def test_an_argument_of_another_type():
    with pytest.raises(TypeError, match="not int"):
        resolve(50051)


def test_the_token_is_never_shown(tmp_path):
    assert "secret" not in repr(ServiceConfig(token="secret"))
    with pytest.raises(ValueError, match="white space") as caught:
        ServiceConfig(token="se cret")
    assert "cret" not in str(caught.value)


def test_a_token_file_is_read_anew_each_time(tmp_path):
    path = tmp_path / "token"
    config = ServiceConfig(token_file=str(path))
    with pytest.raises(ValueError, match=r"token_file '.*token' cannot be read: No such file"):
        config.read_token()
    for token in ("first", "second"):
        path.write_text(f"{token}\n")
        assert config.read_token() == token
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds an empty token"):
        config.read_token()
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="it is not text"):
        config.read_token()
    assert ServiceConfig().read_token() is None
