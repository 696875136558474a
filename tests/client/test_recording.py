"""What a trainer records: all of a trip, waits and policies, and by default nothing."""

from __future__ import annotations

import threading
import time
from collections import Counter

import pytest
import torch
from torch import nn

from fake_front import FakeFront, until
from preconditioner_client import (
    Ridge,
    RootConfig,
    ServiceConfig,
    Shampoo,
    StalenessConfig,
    preconditioned_optimizer,
)
from preconditioner_client.service_exchange import ServiceExchange
from preconditioner_protos.history import HistoryError, Kind, read_history
from preconditioner_worker.history import Expectations, examine

TOKEN = "a-token-that-nobody-may-read"


@pytest.fixture
def front():
    running = FakeFront()
    running.token = TOKEN
    yield running
    running.stop()


class Training:
    """Two small blocks at a front of this process."""

    def __init__(self, front, folder, **staleness):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
        self.path, self.matrices = folder / "trainer.jsonl", folder / "matrices"
        self.optimizer = Shampoo(
            self.model.parameters(),
            root=RootConfig(ridge=Ridge(kind="absolute", value=1e-6)),
            staleness=StalenessConfig(**{"refresh_every": 2, "max_staleness": 6, **staleness}),
            service=ServiceConfig(
                address=front.address,
                token=TOKEN,
                history_file=str(self.path),
                history_matrices=str(self.matrices),
            ),
        )

    def step(self):
        self.optimizer.zero_grad()
        self.model(torch.randn(8, 6)).square().sum().backward()
        self.optimizer.step()
        return self.optimizer.metrics()

    def judged(self):
        self.optimizer.close()
        expectations = Expectations(matrices=self.matrices, step_seconds=5.0)
        return examine([self.path], expectations=expectations)


def test_trips_are_recorded_whole_and_break_no_rule(front, tmp_path):
    training = Training(front, tmp_path, max_staleness=1000)
    until(lambda: training.step()["versions_adopted"] >= 12)
    report = training.judged()
    assert report.violations == ()
    kinds = Counter(event.kind for event in report.history.events)
    metrics = training.optimizer.metrics()
    assert kinds[Kind.STEP_BEGUN] == kinds[Kind.STEP_ENDED] == metrics["step"]
    assert kinds[Kind.ADOPTED] == metrics["versions_adopted"]
    assert kinds[Kind.SNAPSHOT_SENT] == metrics["snapshots_sent"]
    assert kinds[Kind.RECEIVED] == metrics["received"]
    assert kinds[Kind.SNAPSHOT_ACKNOWLEDGED] >= 12
    assert kinds[Kind.TRAINER_SESSION] == kinds[Kind.TRAINER_ATTACHED] == kinds[Kind.TRAINER_DETACHED] == 1
    assert report.looked_at["roots"] >= 12
    assert TOKEN.encode() not in training.path.read_bytes()


def test_a_wait_in_vain_is_recorded_with_its_breaker(front, tmp_path):
    training = Training(front, tmp_path, policy="wait", stale_timeout=1.0)
    until(lambda: training.step()["blocks_with_version"] == 2)
    front.on_snapshot = lambda stream, block: stream.receipt(block)
    until(lambda: training.step()["wait_timeouts"] == 1)
    report = training.judged()
    assert report.violations == ()
    events = report.history.events
    (end,) = [e for e in events if e.kind is Kind.WAIT_ENDED and e.data["timed_out"]]
    assert 1.0 <= end.data["seconds"] < 5.0
    actions = [e.data["action"] for e in events if e.kind is Kind.POLICY_ACTED]
    assert actions == ["breaker_opened", "graft"]


def test_a_step_that_is_interrupted_while_it_waits_is_recorded_to_its_end(front, tmp_path, monkeypatch):
    training = Training(front, tmp_path, policy="wait", stale_timeout=60.0)
    until(lambda: training.step()["blocks_with_version"] == 2)
    front.on_snapshot = lambda stream, block: stream.receipt(block)

    def interrupted(self, timeout):
        time.sleep(0.05)
        raise KeyboardInterrupt

    monkeypatch.setattr(ServiceExchange, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        until(lambda: training.step()["step"] > 1000)
    report = training.judged()
    assert report.violations == ()
    begun, wait, ended = (
        [e for e in report.history.events if e.kind is kind][-1]
        for kind in (Kind.STEP_BEGUN, Kind.WAIT_ENDED, Kind.STEP_ENDED)
    )
    assert begun.step == wait.step == ended.step
    assert ended.data["raised"] is True
    assert 0.05 <= wait.data["seconds"] == pytest.approx(ended.data["waited"], abs=1e-5)


@pytest.mark.parametrize("late", ["open", "apply_updates"])
def test_all_of_a_step_is_timed(front, tmp_path, monkeypatch, late):
    training = Training(front, tmp_path)
    owner = ServiceExchange if late == "open" else preconditioned_optimizer
    real = getattr(owner, late)

    def slow(*args):
        time.sleep(0.2)
        return real(*args)

    monkeypatch.setattr(owner, late, slow)
    training.step()
    (ended,) = [e for e in training.judged().history.events if e.kind is Kind.STEP_ENDED]
    assert ended.data["seconds"] >= 0.2


def fresh(metrics):
    return metrics["blocks_with_version"] == 2 and metrics["age_max"] <= 3


@pytest.mark.parametrize("policy", ["graft", "keep"])
def test_a_policy_is_recorded_when_it_begins_to_act(front, tmp_path, policy):
    training = Training(front, tmp_path, policy=policy)
    until(lambda: fresh(training.step()))  # or the policy acts already
    switched = training.optimizer.metrics()["step"]
    front.on_snapshot = lambda stream, block: stream.receipt(block)
    for _ in range(20):
        training.step()
    report = training.judged()
    assert report.violations == ()
    acted = [e for e in report.history.events if e.kind is Kind.POLICY_ACTED and e.step > switched]
    # Versions that were under way may have come later than they were due, and ended what had begun.
    ended = [index for index, e in enumerate(acted) if not e.data["blocks"]]
    acted = acted[ended[-1] + 1 :] if ended else acted
    assert {e.data["action"] for e in acted} == {policy}
    assert acted[-1].data["blocks"] == [0, 1]
    assert len(acted) <= 2, "once for each block that goes beyond the bound, not once a step"


def test_by_default_nothing_is_recorded(front, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = {thread.name for thread in threading.enumerate()}
    service = ServiceConfig(address=front.address, token=TOKEN)
    optimizer = Shampoo([nn.Parameter(torch.ones(3, 3))], service=service)
    assert "preconditioner-history" not in {thread.name for thread in threading.enumerate()} - before
    optimizer.close()
    assert list(tmp_path.iterdir()) == []


def test_the_environment_turns_it_on(front, tmp_path, monkeypatch):
    monkeypatch.setenv("PRECONDITIONER_CLIENT_HISTORY_FILE", str(tmp_path / "env.jsonl"))
    service = ServiceConfig(address=front.address, token=TOKEN)
    Shampoo([nn.Parameter(torch.ones(3, 3))], service=service).close()
    assert read_history([tmp_path / "env.jsonl"]).events[-1].kind is Kind.RECORDER_CLOSED


def test_a_file_that_cannot_be_written_is_an_error_at_once(front, tmp_path):
    service = ServiceConfig(address=front.address, token=TOKEN, history_file=str(tmp_path / "no" / "a.jsonl"))
    with pytest.raises(HistoryError, match="give a file in a folder that exists"):
        Shampoo([nn.Parameter(torch.ones(3, 3))], service=service)
    with pytest.raises(ValueError, match="history_matrices needs history_file"):
        ServiceConfig(history_matrices="m")
