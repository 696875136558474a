"""Ray actors die at work, of their work, and for want of memory; the trainer goes on and is served again."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import psutil
import pytest

from fault_stage import BACK, LARGE
from histories import OF_A_SERVICE, Histories
from preconditioner_protos.v1 import preconditioner_pb2 as pb
from processes import gone
from raw_trainer import RawTrainer, expected_root, manifest, open_request, statistics
from service_process import TOKEN, ServiceProcess, wait_for

MIB = 1 << 20


@pytest.fixture(scope="module")
def large():
    return statistics(LARGE)


@pytest.fixture
def matrix(large, stage):
    """Of this test alone: were those of two jobs the same, none that crossed would show."""
    return large * (1 + stage.seed())


def test_killed_mid_root(stage, fault_report):
    with fault_report.fault("actor killed mid-root") as fault:
        before = stage.trainer.for_seconds(2)
        actor = stage.actor()
        deaths = stage.service.log.count("worker lost")
        actor.send_signal(signal.SIGSTOP)  # so that a root is surely under way
        wait_for(stage.in_flight, what="work in flight")
        fault.injected("SIGKILL of the only actor, work in flight")
        actor.kill()
        # Ray may have it back before anybody can see the service count none.
        wait_for(
            lambda: stage.service.log.count("worker lost") > deaths, what="the news of the actor's death"
        )
        fault.detected("the service logs the lost worker")
        stage.served_again(fault, before)
        assert stage.actor().pid != actor.pid


@pytest.mark.long_form
def test_killed_while_idle(fault_report, tmp_path):
    """Whoever is dead already is not held against the block that comes next, though one death is too many."""
    histories = Histories(tmp_path)
    with (
        fault_report.fault("idle actor killed") as fault,
        ServiceProcess(arguments=["--quarantine-after=1", *histories.service()]) as service,
        contextlib.closing(histories.recorder()) as recorder,
    ):
        raw = RawTrainer(service.address, TOKEN, recorder)
        raw.open(open_request("late", manifest((32,))))
        stream = raw.attach()
        fault.injected("SIGKILL of an actor without work, and a block right after it")
        service.actors()[0].kill()
        stream.snapshot(0, 1, statistics(32))
        wait_for(lambda: "worker lost" in service.log, what="the news of the actor's death")
        fault.detected("the service logs the lost worker")
        stream.until(lambda: stream.nacks or stream.arrived)
        assert stream.versions() == [(0, 1)]
        fault.recovered("computed by a new actor, in no quarantine", within=BACK)
        service.signal(signal.SIGTERM)  # what it does not say afterwards is no mere delay
        assert service.process.wait(30) == 0
        recorder.flush()
        histories.judge(fault, seen=OF_A_SERVICE)


@pytest.mark.long_form
def test_a_block_that_kills_its_actors(stage, fault_report, matrix):
    """Whatever computes it is killed: it is set aside after three, by name, and the others are served."""
    with fault_report.fault("actor killed repeatedly") as fault:
        before = stage.trainer.for_seconds(2)
        raw, stream = stage.large("poison")
        fault.injected("SIGKILL of every actor that computes one block")
        stream.snapshot(0, 1, matrix)
        killed = 0
        while not stream.nacks:
            # Small blocks before it take milliseconds: what is in flight for longer is this one.
            if stage.computes("poison", 0.3):
                deaths = stage.service.log.count("worker lost")
                stage.actor().kill()
                killed += 1
                # Ray may have it back before anybody can see the service count none.
                wait_for(
                    lambda before=deaths: stage.service.log.count("worker lost") > before or stream.nacks,
                    what="the news of it",
                )
        fault.detected(f"quarantined with a NACK after {killed} deaths")
        (nack,) = stream.nacks
        assert (nack.block, nack.step, nack.reason) == (0, 1, pb.NACK_REASON_WORKER_LOST)
        assert "quarantine" in nack.detail
        assert "block quarantined" in stage.service.log
        stream.snapshot(0, 2, matrix)
        stream.until(lambda: len(stream.nacks) == 2)
        fault.lifted()  # nothing kills actors any more, as nothing computes the block
        stage.served_again(fault, before)
        releases = stage.service.log.count("quarantines ended")
        stage.service.signal(signal.SIGUSR1)
        wait_for(
            lambda: stage.service.log.count("quarantines ended") > releases, what="the operator's release"
        )
        stream.snapshot(0, 3, matrix)
        stream.until(lambda: stream.versions() == [(0, 3)])
        raw.close()


def test_out_of_memory_by_limit(stage, fault_report, matrix):
    with fault_report.fault("actor out of memory (RLIMIT_AS)") as fault:
        before = stage.trainer.for_seconds(2)
        actor = stage.actor()
        raw, stream = stage.large("hungry")
        limit = actor.memory_info().vms + 48 * MIB
        fault.injected("48 MiB of address space left to the actor, a block that needs more")
        actor.rlimit(psutil.RLIMIT_AS, (limit, psutil.RLIM_INFINITY))
        stream.snapshot(0, 1, matrix)
        stream.until(lambda: stream.nacks or stream.arrived)
        fault.detected("a NACK that names the block" if stream.nacks else "the actor died and was replaced")
        with contextlib.suppress(psutil.NoSuchProcess):
            actor.rlimit(psutil.RLIMIT_AS, (psutil.RLIM_INFINITY, psutil.RLIM_INFINITY))
        stage.served_again(fault, before)
        releases = stage.service.log.count("quarantines ended")
        stage.service.signal(signal.SIGUSR1)
        wait_for(
            lambda: stage.service.log.count("quarantines ended") > releases, what="the operator's release"
        )
        stream.snapshot(0, 2, matrix)
        stream.until(lambda: stream.versions()[-1:] == [(0, 2)])
        raw.close()


@contextlib.contextmanager
def memory_cgroup(megabytes: int):
    """A function that puts a process under a limit of further memory, by the kernel; skips without rights."""
    root = Path("/sys/fs/cgroup/memory")
    group = root / f"preconditioner-faults-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(megabytes * MIB))
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here ({error}); RLIMIT_AS stands in for it")
    try:
        yield lambda pid: (group / "cgroup.procs").write_text(str(pid))
    finally:
        for pid in (group / "cgroup.procs").read_text().split():
            (root / "cgroup.procs").write_text(pid)
        group.rmdir()


@pytest.mark.long_form
def test_out_of_memory_by_the_kernel(stage, fault_report, matrix):
    with memory_cgroup(64) as confine, fault_report.fault("actor out of memory (kernel)") as fault:
        before = stage.trainer.for_seconds(2)
        actor = stage.actor()
        raw, stream = stage.large("greedy")
        confine(actor.pid)
        fault.injected("64 MiB left to the actor by its cgroup, a block that needs more")
        stream.snapshot(0, 1, matrix)
        wait_for(lambda: gone([actor]), what="the OOM kill")
        fault.detected("the kernel's OOM killer ended the actor")
        stream.until(lambda: stream.versions() == [(0, 1)])
        assert abs(stream.root(0, 1) - expected_root(matrix)).max() < 1e-3, (
            "by the next actor, as it should be"
        )
        stage.served_again(fault, before)
        raw.close()
