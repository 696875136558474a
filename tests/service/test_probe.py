"""``preconditioner-service health`` and ``status`` against a real server, in plaintext and mutual TLS."""

from __future__ import annotations

import json

import pytest

from in_process_service import InProcessService
from preconditioner_service import cli, tokens
from preconditioner_service.certificates import make_certificates
from raw_trainer import manifest, open_request

TOKEN, WATCHER = "token-of-a-job", "token-of-a-watcher"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_certificates(tmp_path_factory.mktemp("certificates") / "a", ["preconditioners.internal"])


@pytest.fixture(scope="module")
def watcher(tmp_path_factory):
    path = tmp_path_factory.mktemp("watcher") / "token"
    path.write_text(f"{WATCHER}\n")
    path.chmod(0o600)
    return path


@pytest.fixture(scope="module")
def services(tmp_path_factory, files):
    """Plaintext, and mutual TLS."""
    jobs = tmp_path_factory.mktemp("jobs") / "jobs.toml"
    good, watching = (tokens.show(tokens.digest(token)) for token in (TOKEN, WATCHER))
    jobs.write_text(f"status_tokens = ['{watching}']\n[jobs.llm]\ntokens = ['{good}']\n")
    tls = {"tls_cert": files.server, "tls_key": files.server_key, "tls_client_ca": files.ca}
    both = [InProcessService(jobs_file=jobs), InProcessService(jobs_file=jobs, **tls)]
    yield both
    for service in both:
        service.stop()


def set_health(service: InProcessService, serving: bool) -> None:
    service._loop.call_soon_threadsafe(service._run._health.set, serving)


@pytest.fixture
def ask(files, capsys):
    """Runs a command; returns its exit status and what it wrote."""

    def run(command: str, service: InProcessService, *more: str, tls: bool = False) -> tuple[int, str, str]:
        options = [f"--tls-ca={files.ca}", f"--tls-cert={files.client}", f"--tls-key={files.client_key}"]
        options += ["--tls-server-name=preconditioners.internal"]
        status = cli.main([command, f"127.0.0.1:{service.port}", *(options if tls else []), *more])
        written = capsys.readouterr()
        return status, written.out, written.err

    return run


@pytest.mark.parametrize("tls", [False, True])
def test_health_is_the_exit_status(services, ask, tls):
    service = services[tls]
    set_health(service, False)
    status, _, error = ask("health", service, tls=tls)
    assert status == 1
    assert "NOT_SERVING" in error
    set_health(service, True)
    assert ask("health", service, tls=tls) == (0, "SERVING\n", "")


def test_health_of_none_and_without_tls(services, files, ask, capsys):
    status, _, error = ask("health", services[1], "--timeout=2")
    assert status == 1
    assert "--tls-ca" in error
    status, _, error = ask("health", services[1], f"--tls-ca={files.ca}", "--timeout=2")
    assert status == 1
    assert "--tls-server-name" in error
    assert cli.main(["health", "127.0.0.1:1", f"--tls-cert={files.client}"]) == 2
    assert "tls_key" in capsys.readouterr().err


@pytest.mark.parametrize("tls", [False, True])
def test_status(services, files, watcher, ask, tls):
    service = services[tls]
    if not tls:
        trainer = service.trainer(TOKEN)
        trainer.open(open_request("llm", manifest((4,), (8,)), epoch=7))
    status, shown, _ = ask("status", service, f"--token-file={watcher}", "--json", tls=tls)
    assert status == 0
    answer = json.loads(shown)
    assert answer["protocol_version_max"] == 1
    assert answer["draining"] is False
    jobs = [] if tls else [("llm", 7, 1, 2, 0)]
    assert [
        (job["job"], job["epoch"], job["ranks"], job["blocks"], job["nacks"]) for job in answer["jobs"]
    ] == jobs
    status, shown, _ = ask("status", service, f"--token-file={watcher}", tls=tls)
    assert status == 0
    assert ("llm" in shown) is not tls
    if not tls:
        trainer.close()
        trainer.channel.close()


def test_status_without_a_good_token(services, tmp_path, ask, watcher, capsys):
    wrong = tmp_path / "wrong"
    wrong.write_text("not-the-token\n")
    status, shown, error = ask("status", services[0], f"--token-file={wrong}")
    assert (status, shown) == (1, "")
    assert "UNAUTHENTICATED" in error
    assert "not-the-token" not in error
    assert cli.main(["status", "192.0.2.1:50051", f"--token-file={watcher}"]) == 1
    assert "--allow-plaintext" in capsys.readouterr().err
