"""Processes: the ready line, the end by signal, by the parent's end and by SIGKILL, and lost workers."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import grpc
import psutil
import pytest
from conftest import TOKEN
from grpc_health.v1 import health_pb2, health_pb2_grpc

from preconditioner_protos.v1 import preconditioner_pb2 as pb
from processes import command_line, family, gone, kill, listening, named
from raw_http2 import Connection, framed
from raw_trainer import manifest, open_request, statistics, wait_for


def test_ready_line(service):
    assert service.line == {"event": "ready", "address": service.address, "pid": service.process.pid}
    assert service.address.startswith("127.0.0.1:")


def test_rays_directory_is_closed_to_other_users(service):
    raylet = named("raylet", service.family())
    option = next(part for part in raylet.cmdline() if part.startswith("--store_socket_name="))
    directory = Path(option.partition("=")[2]).parents[3]
    assert directory.name.startswith("preco-")
    assert directory.stat().st_mode & 0o777 == 0o700


def test_workers_are_as_nice_as_the_service(service, all_workers):
    """By Ray's default any busy program, the service too, leaves them a thirtieth of the cores."""
    assert [worker.nice() for worker in service.workers()] == [os.nice(0)] * 2


def test_no_port_of_a_private_ray_is_open_to_other_machines(service, all_workers):
    assert {ip.removeprefix("::ffff:") for ip, _ in listening(service.family())} == {"127.0.0.1"}


def test_a_taken_port_is_told_at_once(start):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        began = time.monotonic()
        failed = start(f"--port={port}")
        assert failed.process.wait(30) == 1
    assert failed.line["event"] == "failed"
    assert f"port {port}" in failed.line["reason"]
    assert "--port 0" in failed.line["reason"]
    assert time.monotonic() - began < 10


def test_a_cluster_that_is_not_there(start):
    failed = start("--ray-address=127.0.0.1:1")
    assert failed.process.wait(60) == 1
    assert failed.line["event"] == "failed"
    assert "127.0.0.1:1" in failed.line["reason"]


def test_sigterm_drains_what_was_acknowledged(start, tmp_path):
    """And the private Ray and its directory are gone, and the ready file was there."""
    service = start("--num-workers=1", "--drain-grace=30", f"--ready-file={tmp_path / 'ready.json'}")
    assert json.loads((tmp_path / "ready.json").read_text()) == service.line
    trainer = service.trainer()
    trainer.open(open_request("draining", manifest(*[(700, 700)] * 6)))
    stream = trainer.attach()
    matrix = statistics(700)
    for block in range(6):
        stream.snapshot(block, 1, matrix, matrix)
    stream.until(lambda: len(stream.receipts) == 6)
    late = service.trainer()
    watch = health_pb2_grpc.HealthStub(late.channel).Watch(health_pb2.HealthCheckRequest())
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    deaf = Connection(service.address, window=0)  # it has no room for a byte, and delays nothing
    deaf.send(deaf.call("/grpc.health.v1.Health/Watch", None), framed(b""), end=True)
    members = service.family()
    service.process.send_signal(signal.SIGTERM)
    stream.until(lambda: stream.drains)
    assert stream.drains[0].grace_seconds == 30
    assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
    if not stream.ended:
        with pytest.raises(grpc.RpcError) as caught:
            late.open(open_request("late", manifest((4,))))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    stream.until(lambda: stream.ended)
    assert stream.code is grpc.StatusCode.UNAVAILABLE
    assert sorted(stream.versions()) == [(block, 1) for block in range(6)]
    watch.cancel()
    assert service.process.wait(30) == 0
    deaf.close()
    wait_for(lambda: gone(members), timeout=10)
    log = service.log()
    assert "draining" in log
    assert "complete=True" in log


def test_the_services_end_by_sigkill_ends_ray_too(start):
    service = start("--num-workers=1")
    members = service.family()
    assert len(members) > 3
    os.kill(service.process.pid, signal.SIGKILL)
    wait_for(lambda: gone(members), timeout=20)


_TRAINER = """
import os, subprocess, sys, time
read, write = os.pipe()
service = subprocess.Popen(
    [sys.executable, "-m", "preconditioner_service", "serve", "--num-workers=1",
     f"--parent-pid={os.getpid()}"],
    stdin=read, stdout=subprocess.PIPE, start_new_session=True,
)
os.close(read)
print(service.stdout.readline().decode(), end="", flush=True)
if os.fork() == 0:  # as a DataLoader worker: it holds the pipe open beyond the trainer's end
    os.set_inheritable(write, True)
    print(os.getpid(), flush=True)
    time.sleep(600)
time.sleep(600)
"""


def test_the_parents_end_by_sigkill_ends_the_service_although_a_child_holds_the_pipe():
    trainer = subprocess.Popen(
        [sys.executable, "-c", _TRAINER],
        stdout=subprocess.PIPE,
        env={**os.environ, "PRECONDITIONER_SERVICE_TOKEN": TOKEN},
        text=True,
    )
    child = None
    try:
        ready = json.loads(trainer.stdout.readline())
        child = int(trainer.stdout.readline())
        members = family(ready["pid"])
        os.kill(trainer.pid, signal.SIGKILL)
        wait_for(lambda: gone(members), timeout=20)
        assert psutil.pid_exists(child)
    finally:
        trainer.kill()
        if child is not None:
            os.kill(child, signal.SIGKILL)
        trainer.wait()
        trainer.stdout.close()


def test_end_of_file_on_stdin_ends_the_service_without_the_drain(start):
    service = start("--num-workers=1", f"--parent-pid={os.getpid()}", "--drain-grace=600")
    trainer = service.trainer()
    trainer.open(open_request("job", manifest((4,))))
    stream = trainer.attach(credit_bytes=0, answer=False)
    stream.snapshot(0, 1, statistics(4))
    stream.until(lambda: stream.arrived)  # no receipt: a drain would wait for it
    members = service.family()
    service.process.stdin.close()
    assert service.process.wait(15) == 0
    wait_for(lambda: gone(members), timeout=10)
    assert 'sign="end of file on stdin"' in service.log()
    assert "complete=False" in service.log()


def test_a_worker_killed_at_work_costs_time_only(service, trainer, job, all_workers):
    count = 30
    trainer.open(open_request(job, manifest(*[(600, 600)] * count)))
    stream = trainer.attach()
    matrix = statistics(600)
    workers = service.workers()
    for block in range(count):
        stream.snapshot(block, 1, matrix, matrix)
    stream.until(lambda: stream.arrived)
    kill(workers)
    stream.until(lambda: len(stream.arrived) == count)
    assert sorted(stream.versions()) == [(block, 1) for block in range(count)]
    assert not stream.nacks
    wait_for(lambda: "worker lost" in service.log())
    wait_for(lambda: trainer.status().workers == 2)


def test_a_frozen_worker_is_replaced(service, trainer, job, all_workers):
    trainer.open(open_request(job, manifest(*[(64,)] * 200)))
    stream = trainer.attach()
    frozen = service.workers()[0]
    frozen.suspend()
    try:
        for step in range(1, 4):
            for block in range(200):
                stream.snapshot(block, step, statistics(64))
        stream.until(lambda: {(block, 3) for block in range(200)} <= set(stream.versions()))
        wait_for(lambda: gone([frozen]), timeout=30)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            frozen.resume()
    wait_for(lambda: trainer.status().workers == 2)
    assert not [nack for nack in stream.nacks if nack.reason != pb.NACK_REASON_OUTDATED]


def test_secrets_never_reach_logs(service, trainer, job):
    wrong = service.trainer(token="another-secret-93ab")
    with pytest.raises(grpc.RpcError):
        wrong.status()
    wrong.channel.close()
    opened = trainer.open(open_request(job, manifest((4,))))
    trainer.attach().cancel()
    wait_for(lambda: f"job={job}" in service.log() and "unauthenticated" in service.log())
    log = service.log()
    assert TOKEN not in log
    assert "another-secret-93ab" not in log
    assert opened.session_id not in log
    assert TOKEN not in " ".join(command_line(process) for process in service.family())


def test_the_trainers_words_cannot_forge_log_lines(service, trainer, job):
    client = 'x" event=forged\n2026-01-01T00:00:00.000Z INFO forged'
    trainer.open(open_request(job, manifest((4,)), client=client))
    wait_for(lambda: f"job={job}" in service.log())
    assert not any(line.endswith("INFO forged") for line in service.log().splitlines())
