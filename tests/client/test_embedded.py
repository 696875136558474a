"""The life of the subprocess, with small scripts in place of the service."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time

import psutil
import pytest

from exchange_session import session
from fake_front import until
from preconditioner_client import embedded
from preconditioner_client.embedded import EmbeddedService
from preconditioner_client.endpoint import EmbeddedEndpoint, check_installed
from preconditioner_client.exchange import ExchangeError
from preconditioner_client.service_config import ServiceConfig
from preconditioner_client.service_exchange import ServiceExchange
from processes import gone

READY = """
    import json, os, sys
    print("Ray says something on stdout", flush=True)
    pid = os.getpid()
    print(json.dumps({"event": "ready", "address": f"127.0.0.1:{pid}", "pid": pid}), flush=True)
    print("and later", flush=True)
    print("something on stderr", file=sys.stderr, flush=True)
    sys.stdin.read()  # until the trainer is gone
"""


@pytest.fixture
def start():
    made: list[EmbeddedService] = []

    def make(script: str, start_timeout: float = 20.0) -> EmbeddedService:
        command = [sys.executable, "-c", textwrap.dedent(script)]
        service = EmbeddedService(start_timeout=start_timeout, command=command)
        made.append(service)
        return service

    yield make
    for service in made:
        service.close()


def located(service: EmbeddedService) -> str:
    place = service.locate(20)
    assert place is not None
    assert place[1] == service.token
    return place[0]


def failure(service: EmbeddedService) -> str:
    with pytest.raises(ExchangeError) as caught:
        service.locate(20)
    return str(caught.value)


def test_it_is_ready_with_address_and_token(start, caplog):
    with caplog.at_level(logging.INFO, "preconditioner_client"):
        service = start(READY)
    assert "service is being started, which takes some seconds; until it has" in caplog.text
    assert str(service.log_path) in caplog.text
    address = located(service)
    process = psutil.Process(int(address.rsplit(":", 1)[1]))
    assert process.pid == service.pid
    environment = process.environ()
    assert environment["PRECONDITIONER_SERVICE_TOKEN"] == service.token
    assert service.token not in " ".join(process.cmdline())
    assert os.getsid(process.pid) == process.pid  # the terminal's Ctrl-C is not for it
    for line in (b"something on stderr", b"and later"):
        until(lambda line=line: line in service.log_path.read_bytes())
    service.close()
    assert not process.is_running()
    assert not service.log_path.parent.exists()
    service.close()


def test_settings_of_another_service_are_kept_away(start, monkeypatch):
    monkeypatch.setenv("PRECONDITIONER_SERVICE_PORT", "1")
    monkeypatch.setenv("PRECONDITIONER_SERVICE_TOKEN_FILE", "/nowhere")
    monkeypatch.setenv("PRECONDITIONER_SERVICE_LOG_LEVEL", "debug")
    service = start(READY)
    located(service)
    environment = psutil.Process(service.pid).environ()
    assert "PRECONDITIONER_SERVICE_PORT" not in environment
    assert "PRECONDITIONER_SERVICE_TOKEN_FILE" not in environment
    assert environment["PRECONDITIONER_SERVICE_LOG_LEVEL"] == "debug"


@pytest.mark.parametrize(("given", "niceness"), [(None, "15"), ("3", "3")])
def test_its_actors_let_training_go_first(start, monkeypatch, given, niceness):
    if given is not None:
        monkeypatch.setenv("PRECONDITIONER_SERVICE_WORKER_NICE", given)
    service = start(READY)
    located(service)
    assert psutil.Process(service.pid).environ()["PRECONDITIONER_SERVICE_WORKER_NICE"] == niceness


def test_the_service_s_own_reason_is_told(start):
    service = start("""
        import json, sys
        print("a line before", file=sys.stderr, flush=True)
        print(json.dumps({"event": "failed", "reason": "no room in /dev/shm"}), flush=True)
        sys.exit(1)
    """)
    text = failure(service)
    assert "could not be started: no room in /dev/shm" in text
    assert "a line before" in text
    assert str(service.log_path) in text
    assert service.log_path.exists()


def test_a_death_without_reason_is_told_with_its_last_words(start):
    text = failure(start("import sys; print('Traceback: boom', file=sys.stderr); sys.exit(3)"))
    assert "it exited with status 3" in text
    assert "Traceback: boom" in text
    assert "it was killed by SIGKILL" in failure(start("import os; os.kill(os.getpid(), 9)"))


def test_a_start_that_takes_too_long_is_given_up(start):
    service = start("import time; time.sleep(1000)", start_timeout=0.3)
    text = failure(service)
    assert "it was not ready within 0.3 s" in text
    assert "raise ServiceConfig(start_timeout=...)" in text
    assert service.pid is None


def test_a_command_that_does_not_exist():
    service = EmbeddedService(command=["/nowhere/python"])
    assert "/nowhere/python" in failure(service)
    service.close()


def test_it_is_started_again_when_it_dies(start, caplog, monkeypatch):
    monkeypatch.setattr(embedded, "_FIRST_PAUSE", 0.05)
    service = start(READY)
    first = located(service)
    token = service.token
    with caplog.at_level(logging.WARNING, "preconditioner_client"):
        os.kill(service.pid, signal.SIGKILL)
        until(lambda: (place := service.locate(0.1)) is not None and place[0] != first)
    assert service.token == token
    assert "it was killed by SIGKILL" in caplog.text


def test_what_it_leaves_behind_is_killed_with_it(start, monkeypatch):
    monkeypatch.setattr(embedded, "_FIRST_PAUSE", 0.05)
    service = start("import subprocess; subprocess.Popen(['sleep', '1000'])\n" + textwrap.dedent(READY))
    first = located(service)
    (child,) = psutil.Process(service.pid).children()
    os.kill(service.pid, signal.SIGKILL)
    until(lambda: gone([child]))
    until(lambda: (place := service.locate(0.1)) is not None and place[0] != first)


def test_one_that_ignores_sigterm_is_killed(start, monkeypatch):
    monkeypatch.setattr(embedded, "_TERM_SECONDS", 0.3)
    service = start(
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        + textwrap.dedent(READY).replace("sys.stdin.read()", "\nwhile True: signal.pause()")
    )
    located(service)
    process = psutil.Process(service.pid)
    began = time.monotonic()
    service.close()
    assert time.monotonic() - began < 5
    assert not process.is_running()


def test_closing_in_mid_start(start):
    service = start("import time; time.sleep(1000)")
    until(lambda: service.pid is not None)
    process = psutil.Process(service.pid)
    service.close()
    assert not process.is_running()


def test_what_a_killed_trainer_left_on_disk_is_swept(start, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left = tmp_path / "preconditioner-embedded-left"
    left.mkdir()
    (left / "lock").touch()
    one, two = start(READY), start(READY)
    assert not left.exists()
    assert located(one) != located(two)
    assert one.log_path.exists()
    assert two.log_path.exists()


def test_much_output_is_bounded_on_disk(start):
    service = start(textwrap.dedent(READY) + "\nfor i in range(30000): print('x' * 100, flush=i % 100 == 0)")
    located(service)
    service.abandon()  # lets the script go on
    sizes = []

    def has_begun_another():
        with contextlib.suppress(FileNotFoundError):  # between two files
            sizes.append(service.log_path.stat().st_size)
        return sizes and (service.log_path.parent / "service.log.1").exists()

    until(has_begun_another)
    assert max(sizes) <= 2**20


def test_a_forked_child_neither_ends_nor_keeps_the_service(start):
    service = start(READY)
    located(service)
    lifeline = service._lifeline
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            service.close()
            try:
                os.fstat(lifeline)
                os.write(writer, b"still open")
            except OSError:
                os.write(writer, b"given up")
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(reader, 20) == b"given up"
    os.close(reader)
    os.close(writer)
    assert psutil.Process(service.pid).is_running()
    assert service.pid is not None


def test_it_is_shared_by_those_with_the_same_settings(monkeypatch):
    command = [sys.executable, "-c", textwrap.dedent(READY)]
    monkeypatch.setattr(embedded, "_command", lambda workers: command)
    one, two, other = (EmbeddedEndpoint(ServiceConfig(workers=n)) for n in (1, 1, 2))
    place = one.locate(20)
    assert place == two.locate(20)
    assert place != other.locate(20)
    process = psutil.Process(one.service.pid)
    one.release()
    assert process.is_running()
    two.release()
    assert not process.is_running()
    other.release()
    again = EmbeddedEndpoint(ServiceConfig(workers=1))
    assert again.service is not one.service
    again.release()


@pytest.mark.parametrize("missing", ["ray", "preconditioner_service"])
def test_a_missing_install_is_told_at_construction(monkeypatch, missing):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    with pytest.raises(
        ExchangeError, match=rf"needs {missing}.*install async-preconditioner\[service\] from"
    ):
        check_installed()
    with pytest.raises(ExchangeError, match=missing):
        ServiceExchange(ServiceConfig())


def test_a_service_that_cannot_start_is_raised_by_collect(monkeypatch):
    command = [sys.executable, "-c", "import sys; sys.exit('no ray today')"]
    monkeypatch.setattr(embedded, "_command", lambda workers: command)
    exchange = ServiceExchange(ServiceConfig())
    try:
        exchange.open(session())
        assert exchange.wait(20)
        with pytest.raises(ExchangeError, match=r"(?s)could not be started.*no ray today"):
            exchange.collect(0)
        assert exchange.collect(1) == []
    finally:
        exchange.close()


TRAINER = """
import sys
from preconditioner_client import embedded
from preconditioner_client.exchange import BlockSpec, SessionSpec
from preconditioner_client.config import Ridge
from preconditioner_client.service_config import ServiceConfig
from preconditioner_client.service_exchange import ServiceExchange

embedded._command = lambda workers: [sys.executable, "-c", sys.argv[1]]
exchange = ServiceExchange(ServiceConfig())
exchange.open(SessionSpec("trainer", 1, (BlockSpec("a", (3,), (2.0,), Ridge()),)))
service = exchange._background.supervisor._endpoint.service
while service.locate(1) is None:
    pass
print(service.pid, flush=True)
"""


def test_a_trainer_that_just_ends_takes_the_service_with_it():
    began = time.monotonic()
    trainer = subprocess.run(
        [sys.executable, "-c", TRAINER, textwrap.dedent(READY)], capture_output=True, text=True, timeout=60
    )
    assert trainer.returncode == 0, trainer.stderr
    assert not psutil.pid_exists(int(trainer.stdout))
    assert "Traceback" not in trainer.stderr
    assert time.monotonic() - began < 40
