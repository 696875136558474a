"""What surrounds trainer and service: the wall clock jumps, the disk is full, processes are forked."""

from __future__ import annotations

import itertools
import multiprocessing
import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

import loaded_data
import preconditioner_client
import preconditioner_service
from fault_stage import until_fresh
from full_disk import SmallDisk, why_no_small_disk
from histories import Histories
from preconditioner_protos.history import Kind, read_history
from service_process import ServiceProcess
from small_training import Training
from step_times import check_step_times
from trainer_process import TrainerProcess
from wall_clock import COMPILER, DAY, Clock

FRESH = 10.0
NO_DISK = why_no_small_disk()


@pytest.fixture
def histories(tmp_path):
    folder = tmp_path / "history"
    folder.mkdir()
    return Histories(folder)


# -- the clock ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", [preconditioner_client, preconditioner_service])
def test_no_duration_is_taken_from_the_wall_clock(package):
    """It is looked at for what it is made for alone: a job's epoch, and the dates of certificates."""
    allowed = {("engine.py", "time_ns"), ("certificates.py", "now"), ("tls.py", "now")}
    found = {
        (path.name, call)
        for path in Path(package.__file__).parent.rglob("*.py")
        for call in re.findall(
            r"\b(?:time\.(time_ns|time)\(|datetime\.(?:datetime\.)?(now|utcnow)\()", path.read_text()
        )
        for call in call
        if call
    }
    assert found <= allowed


@pytest.mark.long_form
@pytest.mark.skipif(COMPILER is None, reason="there is no C compiler to make another clock with")
def test_the_clock_jumps(tmp_path, histories, fault_report):
    clock = Clock(tmp_path)
    with (
        ServiceProcess(arguments=histories.service(), environment=clock.environment) as service,
        TrainerProcess(
            service.address, environment=clock.environment, connection=histories.trainer()
        ) as trainer,
    ):
        until_fresh(trainer)
        for name, ahead in (("forward by a day", DAY), ("back by two days", -DAY)):
            with fault_report.fault(f"the clock of trainer and service jumps {name}") as fault:
                before = trainer.for_seconds(3)
                clock.set(ahead)
                fault.injected("a preloaded clock")
                fault.nothing_to_notice()
                during = trainer.for_seconds(5)
                until_fresh(trainer)
                fault.recovered("every block has new versions", within=5 + FRESH)
                assert trainer.metrics["connections"] == 1
                check_step_times(fault, before, during)
                histories.judge(fault)
        with fault_report.fault("the clock jumps back, and the service is restarted") as fault:
            fault.injected("a preloaded clock, SIGKILL")
            service.kill()
            clock.set(-2 * DAY)
            trainer.until(lambda: not trainer.metrics["connected"], what="the broken stream")
            fault.detected("the trainer's stream broke")
            service.start()
            fault.lifted()
            trainer.until(lambda: trainer.metrics["connections"] == 2)
            until_fresh(trainer)
            fault.recovered("every block has new versions", within=30)
            histories.judge(fault)


@pytest.mark.long_form
@pytest.mark.skipif(COMPILER is None, reason="there is no C compiler to make another clock with")
def test_a_trainer_restarted_after_the_clock_was_set_back(tmp_path, histories, fault_report):
    clock = Clock(tmp_path)
    with ServiceProcess(arguments=histories.service()) as service:

        def trainer(seed):
            return TrainerProcess(
                service.address,
                seed=seed,
                environment=clock.environment,
                connection={"job": "restarted", **histories.trainer()},
            )

        with fault_report.fault("the clock is set back, and the trainer restarted") as fault:
            first = trainer(seed=0)
            try:
                until_fresh(first)
                first.process.kill()
            finally:
                first.close()
            clock.set(-DAY)
            fault.injected("a day; the same job, without a checkpoint")
            fault.nothing_to_notice()
            with trainer(seed=1) as second:
                until_fresh(second)
                fault.recovered("every block has versions", within=60)
                assert second.metrics["epoch"] > first.metrics["epoch"]
            histories.judge(fault)


# -- the disk ----------------------------------------------------------------------------------------


def test_logs_and_histories_that_cannot_be_written(fault_report):
    """Nothing written to /dev/full stays."""
    service = ServiceProcess(arguments=["--history-file=/dev/full"], log="/dev/full")
    with (
        fault_report.fault("no room for logs and histories (/dev/full)") as fault,
        TrainerProcess(service.address, connection={"history_file": "/dev/full"}) as trainer,
        service,
    ):
        fault.injected("from the start, in trainer and service")
        fault.cannot_be_judged("no history can be written")
        trainer.until(lambda: any("/dev/full" in line for line in trainer.errors), what="the warning")
        fault.detected("one warning")
        before = until_fresh(trainer)
        during = trainer.for_seconds(2)
        until_fresh(trainer)
        fault.recovered("every block has new versions", within=60)
        warnings = [line for line in trainer.errors if "/dev/full" in line]
        assert len(warnings) == 1, trainer.errors
        assert "No space left on device" in warnings[0]
        check_step_times(fault, before, during)


@pytest.mark.long_form
@pytest.mark.skipif(NO_DISK is not None, reason=f"{NO_DISK}: /dev/full stands in for a full disk")
def test_the_disk_fills_up(fault_report):
    with SmallDisk() as disk:
        histories = Histories(disk.path)
        with (
            fault_report.fault("the disk of logs, histories and Ray's files is full") as fault,
            ServiceProcess(
                arguments=histories.service(),
                log=str(disk.path / "service.log"),
                environment={"TMPDIR": str(disk.path)},
            ) as service,
            TrainerProcess(
                service.address,
                connection=histories.trainer(),
                environment={"TMPDIR": str(disk.path)},
            ) as trainer,
        ):
            until_fresh(trainer)
            before = trainer.for_seconds(3)
            disk.fill()
            fault.injected("not a byte is free")
            during = trainer.until(
                lambda: any("No space left" in line for line in trainer.errors), what="the warning"
            )
            fault.detected("one warning")
            during += trainer.for_seconds(5)
            until_fresh(trainer)
            assert len([line for line in trainer.errors if "No space left" in line]) == 1, trainer.errors
            disk.free()
            fault.lifted()
            until_fresh(trainer)
            fault.recovered("every block has new versions", within=FRESH)
            check_step_times(fault, before, during)
            assert trainer.close() == 0
            lost = [
                e
                for e in read_history(disk.path.glob("trainer*.jsonl")).events
                if e.kind is Kind.RECORDER_LOST
            ]
            assert lost, "what could not be written is counted"
            histories.judge(fault)


@pytest.mark.long_form
@pytest.mark.skipif(NO_DISK is not None, reason=f"{NO_DISK}")
def test_results_that_cannot_be_saved(fault_report):
    with SmallDisk() as disk, fault_report.fault("the disk of a run's results is full") as fault:
        disk.fill()
        fault.injected("before the run")
        fault.cannot_be_judged("no service takes part")
        finished = subprocess.run(
            [sys.executable, "-m", "preconditioner_worker.cli", "train", "--workload", "digits",
             "--optimizer", "adamw", "--steps", "2", "--evaluate-every", "1"],
            cwd=disk.path, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert finished.returncode == 1
        assert "Traceback" not in finished.stderr
        assert "No space left on device" in finished.stderr
        fault.detected("an error that names the file, and exit status 1")


# -- forks -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def training(_stage):
    _stage.set()
    training = Training(_stage.service.address, _stage.histories.trainer(), seed=_stage.seed())
    training.until_fresh()
    yield training
    training.optimizer.close()


@pytest.fixture
def parent_is_well(training, _stage):
    """Says that its connection is the same, that versions arrive, and that no rule was broken."""
    connections = training.optimizer.metrics()["connections"]

    def check(fault):
        training.until_fresh()
        fault.recovered("every block has new versions", within=60)
        metrics = training.optimizer.metrics()
        assert metrics["connections"] == connections
        assert metrics["waits"] == 0
        _stage.judge(fault)

    return check


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.long_form)])
def test_dataloader_workers(training, parent_is_well, fault_report, monkeypatch, capfd, method):
    if method == "fork":
        monkeypatch.setattr(loaded_data, "inherited", training.optimizer)
    with fault_report.fault(f"DataLoader workers by {method} after connect") as fault:
        fault.injected("2 epochs with 2 workers each, while snapshots travel")
        fault.nothing_to_notice()
        pids = set()
        for _ in range(2):
            batches = iter(DataLoader(loaded_data.Pids(), num_workers=2, multiprocessing_context=method))
            workers = list(batches._workers)
            for batch in batches:
                training.step()
                pids.add(int(batch[0, 0]))
                assert int(batch[0, 1]) == (0 if method == "fork" else -1), "the exchange is the parent's"
            for worker in workers:
                worker.join(20)
            assert [worker.exitcode for worker in workers] == [0, 0]
        assert len(pids) == 4
        parent_is_well(fault)
    assert "Traceback" not in capfd.readouterr().err


def test_a_forked_child_that_trains(training, parent_is_well, fault_report, capfd):
    with fault_report.fault("a forked child uses the optimizer of its parent") as fault:
        children = [
            multiprocessing.get_context("fork").Process(target=loaded_data.train_in_a_child, args=(training,))
            for _ in range(3)
        ]
        for child in children:
            child.start()
        fault.injected("3 children step and close it")
        fault.nothing_to_notice()
        for _ in itertools.takewhile(
            lambda _: any(child.is_alive() for child in children), itertools.count()
        ):
            training.step()
        for child in children:
            child.join(20)
        assert [child.exitcode for child in children] == [0, 0, 0]
        parent_is_well(fault)
    assert "Traceback" not in capfd.readouterr().err
