"""The trainer's process dies and comes back at an older step, is replaced, or has its clock set."""

from __future__ import annotations

import signal
import time

import grpc
import pytest

from fault_stage import until_fresh
from raw_trainer import manifest, open_request
from service_process import wait_for
from step_times import check_step_times
from trainer_process import TrainerProcess
from wall_clock import COMPILER, DAY, Clock

BACK = 20.0
"""Seconds from the first step of a new trainer to a version of every block."""


@pytest.fixture
def start(stage):
    """Starts trainers of a job."""
    trainers = []

    def starter(job, **options):
        trainers.append(
            TrainerProcess(
                stage.service.address,
                connection={**stage.histories.trainer(), "job": job},
                seed=stage.seed(),
                **options,
            )
        )
        return trainers[-1]

    yield starter
    for trainer in trainers:
        if trainer.process.poll() is None:
            trainer.process.send_signal(signal.SIGCONT)
        trainer.close()


def stopped_behind_its_checkpoint(trainer):
    """Whether it stands now in the second half of the way to its next checkpoint; it goes on if not."""
    trainer.process.send_signal(signal.SIGSTOP)
    said = None
    while said != len(trainer.steps):  # what it has said is read
        said = len(trainer.steps)
        time.sleep(0.2)
    if trainer.metrics["step"] > 20 and 10 < trainer.metrics["step"] % 20 < 19:
        return True
    trainer.process.send_signal(signal.SIGCONT)
    return False


def test_killed_and_resumed_at_an_older_step(stage, start, fault_report, tmp_path):
    with fault_report.fault("trainer killed and resumed") as fault:
        checkpoint = str(tmp_path / "checkpoint.pt")
        first = start("resumed", checkpoint=checkpoint)
        until_fresh(first)
        wait_for(lambda: stopped_behind_its_checkpoint(first), what="a step behind its checkpoint")
        seen = stage.service.log.count("stream detached")
        fault.injected("SIGKILL between two checkpoints")
        first.process.kill()
        first.process.wait(10)
        wait_for(lambda: stage.service.log.count("stream detached") > seen, what="the service's notice")
        fault.detected("the service logs the broken stream")
        second = start("resumed", checkpoint=checkpoint)
        second.until(lambda: second.steps, what="the first step")
        assert second.steps[0].metrics["step"] < first.metrics["step"]
        fault.lifted()
        until_fresh(second)
        fault.recovered("every block has a version of the new epoch", within=BACK)
        assert second.metrics["epoch"] > first.metrics["epoch"]
        assert stage.job("resumed").epoch == second.metrics["epoch"]
        second.close()
        stage.judge(fault)


def test_a_zombie_is_fenced(stage, start, fault_report):
    """The old trainer wakes up after a newer one took its job over: nothing of it is published any more."""
    with fault_report.fault("zombie of the old trainer") as fault:
        old = start("haunted")
        until_fresh(old)
        old.process.send_signal(signal.SIGSTOP)
        new = start("haunted")
        until_fresh(new)
        assert new.metrics["epoch"] > old.metrics["epoch"]
        fault.injected("SIGCONT of a trainer whose job was taken over; it sends on")
        old.process.send_signal(signal.SIGCONT)
        old.until(lambda: not old.metrics["connected"], what="the end of its stream")
        fault.detected("ABORTED, logged once by the old trainer")
        wait_for(lambda: any("taken over" in line for line in old.errors), what="the error in its log")
        received, attempts = old.metrics["received"], old.metrics["connections"]
        until_fresh(new)
        fault.recovered("the new trainer was served all the time", within=BACK)
        assert (old.metrics["received"], old.metrics["connections"]) == (received, attempts)
        with pytest.raises(grpc.RpcError) as refused:
            stage.raw().open(open_request("haunted", manifest((4,)), epoch=old.metrics["epoch"]))
        assert refused.value.code() is grpc.StatusCode.ABORTED
        assert stage.job("haunted").epoch == new.metrics["epoch"]
        assert sum("taken over" in line for line in old.errors) == 1
        old.close()
        new.close()
        stage.judge(fault)


@pytest.mark.skipif(COMPILER is None, reason="there is no C compiler to make another clock with")
def test_the_clock_of_a_trainer_jumps(stage, tmp_path, fault_report):
    clock = Clock(tmp_path)
    with (
        TrainerProcess(
            stage.service.address,
            environment=clock.environment,
            connection=stage.histories.trainer(),
            seed=stage.seed(),
        ) as trainer,
        fault_report.fault("the clock of a trainer alone jumps forward by a day, and back by two") as fault,
    ):
        before = until_fresh(trainer)
        clock.set(DAY)
        fault.injected("a preloaded clock")
        fault.nothing_to_notice()
        during = until_fresh(trainer)
        clock.set(-DAY)
        fault.lifted()
        during += until_fresh(trainer)
        fault.recovered("every block has new versions", within=10.0)
        assert trainer.metrics["connections"] == 1
        check_step_times(fault, before, during)
        stage.judge(fault)
