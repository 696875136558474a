"""A service with one actor, a trainer that trains all the time, and a proxy between them."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import psutil

from fault_catalogue import Fault
from histories import Histories
from preconditioner_protos.history import HistoryRecorder
from preconditioner_protos.v1 import preconditioner_pb2 as pb
from preconditioner_worker.faults.proxy import Proxy
from preconditioner_worker.history import Report
from raw_trainer import RawStream, RawTrainer, manifest, open_request
from service_process import TOKEN, ServiceProcess, wait_for
from step_times import check_step_times
from trainer_process import Step, TrainerProcess

BACK = 20.0
"""Seconds from the end of a fault to a version of every block: the longest pause of a trainer is 5, and Ray
needs some for the process of an actor."""

LARGE = 2048
"""Side of a block that takes an actor about a second."""


def until_fresh(trainer: TrainerProcess) -> list[Step]:
    """Until every block of the trainer has a version from after now; the steps meanwhile."""
    now = trainer.metrics["step"]

    def fresh() -> bool:
        metrics = trainer.metrics
        return metrics["age"] is not None and metrics["step"] - metrics["age"] > now

    return trainer.until(fresh, what="a newer version of every block")


class Stage:
    """Starts all three; ends them on ``close``.

    Args:
        directory: for histories.
    """

    def __init__(self, directory: Path) -> None:
        self.histories = Histories(directory)
        self._by_hand: list[HistoryRecorder] = []
        self._seeds = itertools.count(1)
        self.service = ServiceProcess(arguments=self.histories.service())
        self.supervise()
        self.proxy = Proxy(self.service.address)
        self.trainer = TrainerProcess(self.proxy.address, connection=self.histories.trainer())
        until_fresh(self.trainer)

    def set(self) -> None:
        """All is well, whatever a test before left."""
        self._end_raw()
        self.proxy.heal()
        if self.service.process.poll() is None:
            self.service.thaw()
        else:
            self.supervise()
        until_fresh(self.trainer)

    def supervise(self) -> None:
        """Start the service, again where Ray does not come up in time on a loaded machine."""
        for last in (False, False, True):
            try:
                self.service.start()
            except AssertionError:
                if last:
                    raise
                self.service.process.wait(30)
            else:
                return

    def lost(self, fault: Fault, before: list[Step]) -> None:
        """The trainer has noticed, goes on as before, and nothing of the service is left."""
        during = self.trainer.until(lambda: not self.trainer.metrics["connected"], what="the broken stream")
        fault.detected("the trainer's stream broke")
        during += self.trainer.for_seconds(1)
        check_step_times(fault, before, during)
        wait_for(lambda: not self.service.survivors(), what="the end of Ray's processes")

    def back(self, fault: Fault) -> Report:
        """The service starts again, knowing nothing, and every block gets a version."""
        before = self.trainer.metrics
        self.supervise()
        fault.lifted()
        until_fresh(self.trainer)
        fault.recovered("every block has a newer version", within=BACK)
        assert self.trainer.metrics["connections"] > before["connections"]
        assert self.trainer.metrics["epoch"] == before["epoch"], (
            "a lost session is opened again, no new epoch"
        )
        return self.judge(fault)

    def served_again(self, fault: Fault, before: list[Step]) -> None:
        """Under the same service every block gets a version again."""
        during = until_fresh(self.trainer)
        fault.recovered("every block has a newer version", within=BACK)
        check_step_times(fault, before, during)
        self.judge(fault)

    def judge(self, fault: Fault) -> Report:
        """By the histories of all that happened until now."""
        for recorder in self._by_hand:
            recorder.flush()
        return self.histories.judge(fault)

    def seed(self) -> int:
        """For one more trainer: were its matrices those of another, none that crossed would show."""
        return next(self._seeds)

    def raw(self) -> RawTrainer:
        """A trainer that speaks the protocol by hand, past the proxy; for as long as the test."""
        self._by_hand.append(self.histories.recorder())
        return RawTrainer(self.service.address, TOKEN, self._by_hand[-1])

    def large(self, job: str) -> tuple[RawTrainer, RawStream]:
        """One with a session of one large block, and its stream."""
        raw = self.raw()
        raw.open(open_request(job, manifest((LARGE,)), epoch=time.time_ns()))
        return raw, raw.attach()

    def actor(self) -> psutil.Process:
        """The one that lives now."""
        return wait_for(self.service.actors, what="an actor")[0]

    def workers(self) -> int:
        """As the service counts them."""
        return self._status().workers

    def job(self, name: str) -> pb.JobStatus:
        """What the service says of a job."""
        return next((job for job in self._status().jobs if job.job == name), pb.JobStatus())

    def in_flight(self) -> int:
        """Blocks that are being computed."""
        return sum(job.blocks_in_flight for job in self._status().jobs)

    def _status(self) -> pb.GetStatusResponse:
        raw = RawTrainer(self.service.address, TOKEN)
        try:
            return raw.status()
        finally:
            raw.channel.close()

    def computes(self, name: str, seconds: float) -> bool:
        """Whether a block of the job is in flight now, and still after some seconds."""
        until = time.monotonic() + seconds
        while self.job(name).blocks_in_flight:
            if time.monotonic() > until:
                return True
            time.sleep(0.05)
        return False

    def _end_raw(self) -> None:
        for recorder in self._by_hand:
            recorder.close()
        self._by_hand.clear()

    def close(self) -> None:
        """End all."""
        self._end_raw()
        self.trainer.close()
        self.proxy.close()
        self.service.stop()
