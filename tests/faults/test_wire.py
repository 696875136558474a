"""Messages that were spoilt on their way, in either direction, and ends that read or write slowly.

A real trainer and a real service with a relay between them that changes what passes.
"""

from __future__ import annotations

import dataclasses
import math
import time

import psutil
import pytest

from fault_stage import until_fresh
from message_relay import (
    MessageRelay,
    bit_flipped,
    contradictory,
    duplicated,
    of_chunks,
    of_each_chunk,
    reordered,
    truncated,
    with_value,
)
from preconditioner_protos.v1 import preconditioner_pb2 as pb
from preconditioner_worker.faults.proxy import Proxy, Shape, Way
from raw_trainer import manifest, open_request, statistics
from service_process import wait_for
from small_training import Training
from step_times import check_step_times
from trainer_process import TrainerProcess

FRESH = 10.0
SPOILT = {
    "duplicated messages": duplicated,
    "reordered chunks": of_chunks(reordered),
    "contradictory chunks": of_chunks(contradictory),
    "truncated chunks": of_each_chunk(truncated),
    "bit-flipped chunks": of_each_chunk(bit_flipped),
}
SHORT = (
    ("duplicated messages", "up"),
    ("reordered chunks", "down"),
    ("contradictory chunks", "up"),
    ("truncated chunks", "down"),
    ("bit-flipped chunks", "up"),
)
PASSES = ("duplicated messages",)


@pytest.fixture(scope="module")
def relay(_stage):
    _stage.set()
    with MessageRelay(_stage.service.address) as relay:
        yield relay


@pytest.fixture(scope="module")
def training(_stage, relay):
    run = Training(relay.address, _stage.histories.trainer(), seed=_stage.seed())
    run.until_fresh()
    yield run
    run.optimizer.close()


@pytest.fixture(autouse=True)
def healed(relay, training):
    """What a test that failed left on the wire is none of the next one's."""
    yield
    relay.heal()


@pytest.fixture
def fresh(training, _stage):
    """Says that every block has a new version, that the stream was never broken, and no rule was."""
    connections = training.optimizer.metrics()["connections"]

    def check(fault):
        training.until_fresh()
        fault.recovered("every block has new versions", within=FRESH)
        metrics = training.optimizer.metrics()
        assert metrics["connections"] == connections, "one bad matrix is never the end of the stream"
        assert metrics["waits"] == 0
        _stage.judge(fault)

    return check


class AdoptsNothing:
    """Whether three more messages were refused, and nothing adopted between them."""

    def __init__(self, training, noticed):
        self.training = training
        self.noticed = noticed
        self.since = None

    def __call__(self):
        metrics = self.training.optimizer.metrics()
        if self.since is None or metrics["versions_adopted"] != self.since["versions_adopted"]:
            self.since = metrics
        return metrics[self.noticed] >= self.since[self.noticed] + 3


@pytest.mark.parametrize(
    ("name", "direction"),
    [
        pytest.param(name, direction, marks=() if (name, direction) in SHORT else pytest.mark.long_form)
        for name in SPOILT
        for direction in ("up", "down")
    ],
)
def test_spoilt_chunks(training, relay, fresh, fault_report, name, direction):
    with fault_report.fault(f"{name}, {direction}") as fault:
        training.until_adopted(3)
        before = training.optimizer.metrics()
        setattr(relay, direction, SPOILT[name])
        fault.injected("every message is changed")
        noticed = "nacks" if direction == "up" else "dropped"
        if name in PASSES:
            training.until(lambda: relay.changed >= 20, what="duplicates")
            training.until_adopted(3)  # one of the two serves
            fault.detected("the second of each is dropped or ignored")
        else:
            training.until(lambda: training.optimizer.metrics()[noticed] >= before[noticed] + 3)
            fault.detected(f"{noticed} counted")
            training.until(
                AdoptsNothing(training, noticed),
                what="an end to what was on its way: nothing spoilt is adopted",
            )
        relay.heal()
        fault.lifted()
        fresh(fault)


def spoilt(snapshot, value):
    """With this value in the corner of each matrix of block 0."""
    if snapshot.block != 0:
        return snapshot
    sides = tuple(side.clone() for side in snapshot.sides)
    for side in sides:
        side[0] = value
    return dataclasses.replace(snapshot, sides=sides)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (math.nan, "NOT_FINITE"),
        pytest.param(math.inf, "NOT_FINITE", marks=pytest.mark.long_form),
        (-1e6, "INDEFINITE"),
    ],
    ids=["NaN", "Inf", "indefinite"],
)
def test_statistics_that_have_no_root(training, relay, fresh, fault_report, monkeypatch, value, reason):
    with fault_report.fault(f"{value} in the statistics of a block") as fault:
        training.until_adopted(3)
        optimizer = training.optimizer
        before = optimizer.metrics()
        refresher = optimizer._engine.refresher
        take = refresher._take
        monkeypatch.setattr(
            refresher, "_take", lambda blocks, step: [spoilt(taken, value) for taken in take(blocks, step)]
        )
        fault.injected("every snapshot that the trainer takes of block 0")
        training.until(lambda: optimizer.metrics()["nacks"] >= before["nacks"] + 2)
        fault.detected(f"NACK {reason}")
        expected = pb.NackReason.Value(f"NACK_REASON_{reason}")
        assert {(nack.block, nack.reason) for nack in relay.nacks} == {(0, expected)}
        age = optimizer.metrics()["age"]
        training.until_adopted(4)
        assert optimizer.metrics()["age"] > age, "the last good version of block 0 stays, the others go on"
        monkeypatch.undo()
        fault.lifted()
        training.until(lambda: optimizer.metrics()["age"] < age)
        fresh(fault)


def test_a_preconditioner_that_is_not_finite(training, relay, fresh, fault_report):
    with fault_report.fault("NaN in a preconditioner, checksum right") as fault:
        training.until_adopted(3)
        before = training.optimizer.metrics()
        relay.down = of_each_chunk(with_value(math.nan, block=0))
        fault.injected("every preconditioner of block 0")
        training.until(lambda: training.optimizer.metrics()["dropped"] >= before["dropped"] + 2)
        fault.detected("dropped and counted")
        relay.heal()
        fault.lifted()
        fresh(fault)


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("the service reads slowly", Way.UP),
        pytest.param("the service writes slowly", Way.DOWN, marks=pytest.mark.long_form),
    ],
)
def test_a_slow_service(stage, fault_report, name, way):
    history = stage.histories.trainer()
    del history["history_matrices"]  # saving every step's would be the slowest of all
    with (
        fault_report.fault(f"{name}: 100 kbit/s") as fault,
        Proxy(stage.service.address) as proxy,
        # A snapshot every step, whether or not the one before was answered: more than the wire can carry.
        TrainerProcess(proxy.address, connection=history, seed=stage.seed(), refresh_every=1) as trainer,
    ):
        until_fresh(trainer)
        before = trainer.for_seconds(2)
        process = psutil.Process(trainer.process.pid)
        resident = process.memory_info().rss
        proxy.shape(Shape(rate=100_000), way)
        fault.injected("a snapshot of every block in every step meanwhile")
        if way is Way.UP:
            seen = trainer.metrics["snapshots_replaced"]
            during = trainer.until(lambda: trainer.metrics["snapshots_replaced"] >= seen + 20)
            fault.detected("latest wins in the outbox: snapshots gave way to newer ones")
        else:
            fault.nothing_to_notice()
            during = trainer.for_seconds(5)
        grown = process.memory_info().rss - resident
        fault.note(f"the trainer's memory grew by {grown / 2**20:.0f} MiB")
        assert grown < 64 * 2**20
        proxy.heal()
        fault.lifted()
        until_fresh(trainer)
        fault.recovered("every block has new versions", within=FRESH)
        check_step_times(fault, before, during)
        stage.judge(fault)


@pytest.mark.long_form
def test_a_trainer_that_does_not_read(stage, fault_report):
    with fault_report.fault("a trainer that sends and never reads") as fault:
        resident = psutil.Process(stage.service.process.pid).memory_info().rss
        raw = stage.raw()
        raw.open(open_request("loaded", manifest(*[(512,)] * 8), epoch=time.time_ns()))
        stream = raw.attach(credit_bytes=1 << 40)
        stream.pause_reading()
        matrix = statistics(512, seed=stage.seed())
        fault.injected("100 snapshots of 8 blocks")
        fault.nothing_to_notice()
        for step in range(1, 101):
            for block in range(8):
                stream.snapshot(block, step, matrix)
        until_fresh(stage.trainer)
        grown = psutil.Process(stage.service.process.pid).memory_info().rss - resident
        fault.note(f"the service's memory grew by {grown / 2**20:.0f} MiB")
        assert grown < 200 * 2**20
        fault.lifted()
        stream.resume_reading()
        wait_for(lambda: {(block, 100) for block in range(8)} <= set(stream.versions()))
        fault.recovered("the newest of every block arrived; the other job was served meanwhile", within=60)
        raw.close()
        raw.channel.close()
        stage.judge(fault)
