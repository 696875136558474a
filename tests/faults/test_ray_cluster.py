"""Nodes of a Ray cluster leave and come, and its head is lost: what holds is that nothing hangs.

A service survives the loss of any node but its own. It cannot survive its head: Ray's drivers cannot move to
another, or to the same one restarted. It ends by itself then, with an error that says so, and its supervisor
starts it again; trainers go on meanwhile, and connect when it is back.
"""

from __future__ import annotations

import contextlib

import pytest

from fault_stage import until_fresh
from histories import Histories
from preconditioner_service.ray_link import PATIENCE
from raw_trainer import RawTrainer
from ray_cluster import RayCluster
from service_process import TOKEN, ServiceProcess, wait_for
from step_times import check_step_times
from trainer_process import TrainerProcess

pytestmark = pytest.mark.long_form

BACK = 30.0


class Stage:
    """A cluster of two nodes with an actor on each, a service that joined it, and a trainer."""

    def __init__(self, histories: Histories) -> None:
        self.histories = histories
        with contextlib.ExitStack() as stack:
            self.cluster = stack.enter_context(RayCluster(head_cpus=1))
            self.cluster.add_node(1)
            self.service = stack.enter_context(
                ServiceProcess(
                    workers=2,
                    arguments=["--ray-address", self.cluster.address, *histories.service()],
                    environment=self.cluster.environment,
                )
            )
            self.trainer = stack.enter_context(
                TrainerProcess(self.service.address, connection=histories.trainer())
            )
            until_fresh(self.trainer)
            self.raw = RawTrainer(self.service.address, TOKEN)
            wait_for(lambda: self.workers() == 2, what="both actors")
            self._stack = stack.pop_all()

    def workers(self) -> int:
        return self.raw.status().workers

    def close(self) -> None:
        self._stack.close()


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    stage = Stage(Histories(tmp_path_factory.mktemp("histories")))
    yield stage
    stage.close()


def test_a_node_leaves_and_another_comes(stage, fault_report):
    with fault_report.fault("Ray node removed and added") as fault:
        before = stage.trainer.for_seconds(2)
        fault.injected("every process of a node with one of two actors killed")
        stage.cluster.remove_node()
        wait_for(lambda: stage.workers() == 1, what="the news of the actor's death")
        fault.detected("the service counts one worker")
        during = until_fresh(stage.trainer)
        fault.recovered("every block has a newer version, by the other actor", within=BACK)
        check_step_times(fault, before, during)
        stage.cluster.add_node(1)
        wait_for(lambda: stage.workers() == 2, what="an actor on the new node")
        until_fresh(stage.trainer)
        stage.histories.judge(fault)


@pytest.mark.timeout(400)
def test_the_head_is_lost_and_comes_back(stage, fault_report):
    with fault_report.fault("Ray head lost and back") as fault:
        before = stage.trainer.for_seconds(2)
        fault.injected("every process of the head killed")
        stage.cluster.kill_head()
        assert stage.service.process.wait(PATIENCE + 30) == 1
        fault.detected("the service ended by itself, exit status 1")
        assert "Ray is lost" in stage.service.log
        during = stage.trainer.until(lambda: not stage.trainer.metrics["connected"], what="the broken stream")
        during += stage.trainer.for_seconds(2)
        check_step_times(fault, before, during)
        # A supervisor would try meanwhile too, and be told why it cannot.
        stage.cluster.start_head(2)
        stage.service.start()
        fault.lifted()
        until_fresh(stage.trainer)
        fault.recovered("head and service started again, every block has a newer version", within=BACK)
        stage.histories.judge(fault)
