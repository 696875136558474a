"""The service's process is killed, frozen, restarted and drained under a trainer that goes on."""

from __future__ import annotations

import signal

import grpc
import pytest

from fault_stage import BACK, LARGE, until_fresh
from preconditioner_protos.history import Kind
from preconditioner_service.ray_link import PATIENCE
from preconditioner_worker.faults.proxy import Way
from raw_trainer import manifest, open_request, statistics
from service_process import wait_for
from step_times import check_step_times

NOTICED = 35.0
"""Seconds: keepalive asks after 20 and gives up 10 later."""


def test_killed_mid_chunk(stage, fault_report):
    with fault_report.fault("service killed mid-chunk") as fault:
        before = stage.trainer.for_seconds(2)
        # A block's two sides are 66 kB in one message: the service has the first part of a chunk then.
        stalled = stage.proxy.stall_after(20_000, Way.UP)
        assert stalled.wait(30)
        fault.injected("SIGKILL when 20,000 bytes of a message had come")
        stage.service.kill()
        stage.proxy.heal()
        stage.lost(fault, before)
        stage.back(fault)


@pytest.mark.long_form
def test_killed_between_chunks(stage, fault_report):
    with fault_report.fault("service killed between chunks") as fault:
        before = stage.trainer.for_seconds(2)
        matrix = statistics(LARGE, seed=stage.seed())
        _, stream = stage.large("large")
        stream.snapshot_messages(0, 1, matrix, messages=1)
        fault.injected("SIGKILL when the first of three messages of a block had come")
        stage.service.kill()
        stream.until(lambda: stream.ended)
        stage.lost(fault, before)
        stage.back(fault)
        # Nothing of the half block is left anywhere: the same step, whole, is new to the service.
        raw, stream = stage.large("large")
        stream.snapshot(0, 1, matrix)
        stream.until(lambda: stream.versions() == [(0, 1)])
        raw.close()


@pytest.mark.long_form
def test_killed_while_computing(stage, fault_report):
    with fault_report.fault("service killed while computing") as fault:
        before = stage.trainer.for_seconds(2)
        stage.actor().send_signal(signal.SIGSTOP)  # so that what it computes is surely under way
        wait_for(stage.in_flight, what="work in flight")
        fault.injected("SIGKILL of the server, its actor at work")
        stage.service.kill()
        stage.lost(fault, before)
        stage.back(fault)


@pytest.mark.long_form
def test_restarted_with_an_empty_state(stage, fault_report):
    with fault_report.fault("service restarted with an empty state") as fault:
        before = stage.trainer.for_seconds(2)
        fault.injected("SIGTERM, and a new process at the same port")
        stage.service.signal(signal.SIGTERM)
        assert stage.service.process.wait(30) == 0
        stage.lost(fault, before)
        stage.back(fault)


@pytest.mark.parametrize("seconds", [3, pytest.param(40, marks=pytest.mark.long_form)])
def test_frozen(stage, fault_report, seconds):
    with fault_report.fault(f"service frozen for {seconds} s") as fault:
        before = stage.trainer.for_seconds(2)
        fault.injected("SIGSTOP of the server")
        stage.service.freeze()
        if seconds > NOTICED:
            during = stage.trainer.until(
                lambda: not stage.trainer.metrics["connected"], NOTICED, "the trainer's notice"
            )
            noticed = fault.detected("keepalive broke the trainer's stream")
            assert noticed <= NOTICED
            during += stage.trainer.for_seconds(seconds - noticed)
        else:
            fault.nothing_to_notice()
            during = stage.trainer.for_seconds(seconds)
        stage.service.thaw()
        fault.lifted()
        until_fresh(stage.trainer)
        fault.recovered("SIGCONT, and every block has a newer version", within=BACK)
        check_step_times(fault, before, during)
        stage.judge(fault)


def test_drained_under_load(stage, fault_report):
    """What was acknowledged, before or after the Drain, is computed and delivered before the exit."""
    with fault_report.fault("service drained under load") as fault:
        before = stage.trainer.for_seconds(2)
        raw = stage.raw()
        count = 24
        raw.open(open_request("loaded", manifest(*[(512,)] * count)))
        stream = raw.attach()
        matrix = statistics(512, seed=stage.seed())
        actor = stage.actor()
        actor.suspend()
        for block in range(count):
            stream.snapshot(block, 1, matrix)
        stream.until(lambda: len(stream.receipts) == count)
        fault.injected(f"SIGTERM with {count} blocks of 512 acknowledged, {len(stream.arrived)} delivered")
        assert len(stream.arrived) < count
        stage.service.signal(signal.SIGTERM)
        stream.until(lambda: stream.drains)
        actor.resume()
        stream.snapshot(0, 2, matrix)  # may cross the Drain on its way: refused or computed, never lost
        stream.until(lambda: stream.ended)
        assert stream.code is grpc.StatusCode.UNAVAILABLE
        newest = dict(sorted(stream.versions()))
        # A newer snapshot may have taken the place of an acknowledged one, as at any time.
        assert all(newest.get(block, 0) >= step for block, step in stream.receipts)
        assert stage.service.process.wait(30) == 0
        stage.lost(fault, before)
        report = stage.back(fault)
        drained = [event for event in report.history.events if event.kind is Kind.DRAIN_ENDED]
        assert drained[-1].data["complete"], "the rule looks at drains that were finished"


@pytest.mark.long_form
def test_its_ray_dies(stage, fault_report):
    """The service of a private Ray ends by itself when that is lost, and leaves nothing behind."""
    with fault_report.fault("private Ray lost") as fault:
        before = stage.trainer.for_seconds(2)
        (head,) = stage.service.family("gcs_server")
        fault.injected("SIGKILL of Ray's gcs_server")
        head.kill()
        assert stage.service.process.wait(PATIENCE + 30) == 1
        assert "Ray is lost" in stage.service.log
        stage.lost(fault, before)
        stage.back(fault)
