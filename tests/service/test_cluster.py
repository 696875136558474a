"""On an existing Ray cluster, whose authentication stays on."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from processes import command_line, family, gone, kill
from raw_trainer import expected_root, manifest, open_request, statistics, wait_for
from service_process import free_port


@pytest.fixture
def cluster():
    """Address, token and process of a head of its own. (Not `ray stop`: it ends every Ray of the machine.)"""
    port = free_port()
    # Not below pytest's directory: a unix socket's path must be short.
    directory = Path(tempfile.mkdtemp(prefix="rayhead-", dir="/tmp"))
    token = secrets.token_hex(32)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_USAGE_STATS_ENABLED": "0"}
    ray = Path(sys.executable).with_name("ray")
    arguments = [f"--port={port}", "--num-cpus=2", "--include-dashboard=false", f"--temp-dir={directory}"]
    arguments += ["--object-store-memory=100000000", "--block", "--node-ip-address=127.0.0.1"]
    with (directory / "head.log").open("wb") as log:
        head = subprocess.Popen(
            [ray, "start", "--head", *arguments],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        wait_for(lambda: "Ray runtime started" in (directory / "head.log").read_text())
        yield f"127.0.0.1:{port}", token, head
    finally:
        members = family(head.pid)
        kill(reversed(members))
        head.wait()
        wait_for(lambda: gone(members))
        shutil.rmtree(directory, ignore_errors=True)


@pytest.mark.slow
def test_an_existing_cluster_computes_and_outlives_the_service(start, cluster):
    address, token, head = cluster
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_ADDRESS": "10.255.255.1:1"}
    service = start("--num-workers=2", "--worker-nice=3", f"--ray-address={address}", environment=environment)
    assert service.line["event"] == "ready", service.line
    trainer = service.trainer()
    trainer.open(open_request("job", manifest((32,))))
    stream = trainer.attach()
    stream.snapshot(0, 1, statistics(32))
    stream.until(lambda: stream.arrived)
    assert abs(stream.root(0, 1) - expected_root(statistics(32))).max() < 1e-5
    wait_for(lambda: trainer.status().workers == 2)
    assert [p.nice() for p in family(head.pid) if "RootWorker" in command_line(p)] == [os.nice(0) + 3] * 2
    service.process.terminate()
    assert service.process.wait(30) == 0
    assert token not in service.log()
    assert head.poll() is None, "the cluster outlives the service"

    refused = start(
        f"--ray-address={address}", environment={"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    )
    assert refused.line["event"] == "failed"
    assert "RAY_AUTH_TOKEN" in refused.line["reason"]
    assert refused.process.wait(30) == 1
