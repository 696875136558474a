"""The service's process is killed, frozen, restarted and drained under a trainer that goes on."""

from __future__ import annotations

import signal

import grpc
import pytest

from fault_catalogue import Fault
from histories import Histories
from preconditioner_worker.faults.proxy import Proxy, Way
from raw_trainer import RawTrainer, manifest, open_request, statistics
from service_process import TOKEN, ServiceProcess, wait_for
from step_times import check_step_times
from trainer_process import TrainerProcess

BACK = 20.0
"""Seconds from a service's ready line to a version of every block: the longest pause of a trainer is 5."""

BLOCKS = 6


class Stage:
    """A service, a trainer before it, and a proxy between them; the trainer trains all the time."""

    def __init__(self, histories: Histories) -> None:
        self.histories = histories
        self.service = ServiceProcess(arguments=histories.service()).start()
        self.proxy = Proxy(self.service.address)
        self.trainer = TrainerProcess(self.proxy.address, connection=histories.trainer())
        self.trainer.until_adopted(2 * BLOCKS)

    def lost(self, fault: Fault, before):
        """The trainer has noticed, goes on as before, and nothing of the service is left."""
        during = self.trainer.until(lambda: not self.trainer.metrics["connected"], what="the broken stream")
        fault.detected("the trainer's stream broke")
        during += self.trainer.for_seconds(2)
        check_step_times(fault, before, during)
        wait_for(lambda: not self.service.survivors(), what="the end of Ray's processes")

    def back(self, fault: Fault) -> None:
        """The service starts again, knowing nothing, and every block gets a version."""
        connections = self.trainer.metrics["connections"]
        self.service.start()
        fault.lifted()
        self.trainer.until_adopted(2 * BLOCKS, timeout=BACK + 30)
        fault.recovered("every block has new versions", within=BACK)
        assert self.trainer.metrics["connections"] > connections
        self.histories.judge(fault, unrecorded={"large"})

    def close(self) -> None:
        self.trainer.close()
        self.proxy.close()
        self.service.stop()


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    stage = Stage(Histories(tmp_path_factory.mktemp("histories")))
    yield stage
    stage.close()


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
        raw = RawTrainer(stage.service.address, TOKEN)
        raw.open(open_request("large", manifest((2048,)), epoch=1))
        stream = raw.attach()
        stream.snapshot_messages(0, 1, statistics(2048), messages=1)
        fault.injected("SIGKILL when the first of three messages of a block had come")
        stage.service.kill()
        stream.until(lambda: stream.ended)
        stage.lost(fault, before)
        stage.back(fault)
        # Nothing of the half block is left anywhere: the same step, whole, is new to the service.
        raw = RawTrainer(stage.service.address, TOKEN)
        raw.open(open_request("large", manifest((2048,)), epoch=1))
        stream = raw.attach()
        stream.snapshot(0, 1, statistics(2048))
        stream.until(lambda: stream.versions() == [(0, 1)])
        raw.close()


@pytest.mark.long_form
def test_killed_while_computing(stage, fault_report):
    with fault_report.fault("service killed while computing") as fault:
        before = stage.trainer.for_seconds(2)
        (actor,) = stage.service.actors()
        actor.send_signal(signal.SIGSTOP)  # so that what it computes is surely under way
        wait_for(lambda: in_flight(stage.service), what="work in flight")
        fault.injected("SIGKILL of the server, its actor at work")
        stage.service.kill()
        stage.lost(fault, before)
        stage.back(fault)


@pytest.mark.long_form
def test_restarted_with_an_empty_state(stage, fault_report):
    with fault_report.fault("service restarted with an empty state") as fault:
        before = stage.trainer.for_seconds(2)
        epoch = stage.trainer.metrics["epoch"]
        fault.injected("SIGTERM, and a new process at the same port")
        stage.service.signal(signal.SIGTERM)
        assert stage.service.process.wait(30) == 0
        stage.lost(fault, before)
        stage.back(fault)
        assert stage.trainer.metrics["epoch"] == epoch, "a lost session is opened again, not a new epoch"


@pytest.mark.parametrize(
    "seconds",
    # Keepalive breaks the stream of a service that is silent for half a minute.
    [3, pytest.param(40, marks=pytest.mark.long_form)],
)
def test_frozen(stage, fault_report, seconds):
    with fault_report.fault(f"service frozen for {seconds} s") as fault:
        before = stage.trainer.for_seconds(2)
        fault.injected("SIGSTOP of the server")
        stage.service.freeze()
        during = stage.trainer.for_seconds(seconds)
        stage.service.thaw()
        fault.lifted()
        stage.trainer.until_adopted(2 * BLOCKS, timeout=BACK + 30)
        fault.recovered("SIGCONT, and every block has new versions", within=BACK)
        check_step_times(fault, before, during)
        stage.histories.judge(fault)


def test_drained_under_load(tmp_path, fault_report):
    """What was acknowledged, before or after the Drain, is computed and delivered before the exit."""
    histories = Histories(tmp_path)
    with (
        fault_report.fault("drained under load") as fault,
        ServiceProcess(arguments=histories.service()) as service,
        TrainerProcess(service.address, connection=histories.trainer()) as trainer,
    ):
        trainer.until_adopted(BLOCKS)
        raw = RawTrainer(service.address, TOKEN)
        count = 24
        raw.open(open_request("loaded", manifest(*[(512,)] * count)))
        stream = raw.attach()
        matrix = statistics(512)
        for block in range(count):
            stream.snapshot(block, 1, matrix)
        stream.until(lambda: len(stream.receipts) == count)
        fault.injected(f"SIGTERM with {count} blocks of 512 acknowledged, {len(stream.arrived)} computed")
        assert len(stream.arrived) < count
        service.signal(signal.SIGTERM)
        stream.until(lambda: stream.drains)
        fault.detected("Drain")
        stream.snapshot(0, 2, matrix)  # may cross the Drain on its way: refused or computed, never lost
        stream.until(lambda: stream.ended)
        assert service.process.wait(30) == 0
        fault.recovered("all acknowledged blocks delivered, exit status 0", within=20)
        assert stream.code is grpc.StatusCode.UNAVAILABLE
        assert set(stream.receipts) <= set(stream.versions())
        trainer.until(lambda: not trainer.metrics["connected"], what="the end of the stream")
        assert not service.survivors()
        trainer.close()
        histories.judge(fault, unrecorded={"loaded"})


def in_flight(service) -> int:
    return sum(job.blocks_in_flight for job in RawTrainer(service.address, TOKEN).status().jobs)
