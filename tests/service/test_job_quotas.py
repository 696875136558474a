"""Quotas and weights of a jobs file, as the jobs of a real service with a real worker feel them."""

from __future__ import annotations

import time

import pytest
from conftest import PREFIX, ServiceProcess

from preconditioner_protos import PackedBlock, pack
from preconditioner_service import tokens
from raw_trainer import RawStream, RawTrainer, manifest, open_request, statistics, wait_for

JOBS = {
    "paced": "max_refresh_rate = 2",
    "narrow": "max_in_flight_seconds = 0.001",
    "heavy": "weight = 3",
    "light": "weight = 1",
}
SIDE = 512
BLOCKS = 48
"""Of each busy job: more than are computed in a second, if the test gets no time to send new snapshots."""


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    directory = tmp_path_factory.mktemp("quotas")
    jobs = directory / "jobs.toml"
    digests = {job: tokens.show(tokens.digest(f"token-of-{job}")) for job in JOBS}
    jobs.write_text("".join(f"[jobs.{j}]\ntokens = ['{digests[j]}']\n{line}\n" for j, line in JOBS.items()))
    service = ServiceProcess(
        directory, "--num-workers=1", f"--jobs-file={jobs}", environment={f"{PREFIX}TOKEN": None}
    )
    assert service.line["event"] == "ready", service.line
    yield service
    service.end()


@pytest.fixture
def attach(service):
    """Opens a job of the file with blocks of these sides, and its stream."""
    trainers: list[RawTrainer] = []

    def attacher(job: str, *blocks: tuple[int, ...]) -> RawStream:
        trainers.append(service.trainer(f"token-of-{job}", **{"grpc.use_local_subchannel_pool": 1}))
        trainers[-1].open(open_request(job, manifest(*blocks)))
        return trainers[-1].attach()

    yield attacher
    for trainer in trainers:
        trainer.close()
        trainer.channel.close()


def held_back(service: ServiceProcess, job: str, setting: str) -> bool:
    return any(
        "held back by quota" in line and f"job={job}" in line and f"({setting})" in line
        for line in service.log().splitlines()
    )


def test_a_job_is_refreshed_at_its_rate_however_fast_it_offers(service, attach):
    rate = bucket = 2
    stream = attach("paced", (16,))
    matrix = statistics(16)
    began = time.monotonic()
    step = 0

    def offered() -> bool:
        nonlocal step
        step += 1
        stream.snapshot(0, step, matrix)
        arrived = len(stream.arrived)
        # The time is taken afterwards: what arrived had at most so long.
        assert arrived <= bucket + rate * (time.monotonic() - began)
        return arrived >= 7

    wait_for(offered)
    assert step > 2 * len(stream.arrived)
    wait_for(lambda: held_back(service, "paced", "max_refresh_rate"))


def test_a_job_is_held_to_its_work_in_flight_and_served_in_the_end(service, attach):
    stream = attach("narrow", *[(256,)] * 4)
    packed = (pack(statistics(256)),)
    step = 0

    def offered() -> bool:
        nonlocal step
        step += 1
        stream.send(*(PackedBlock(block, step, packed) for block in range(4)))
        return held_back(service, "narrow", "max_in_flight_seconds")

    wait_for(offered)
    newest = dict.fromkeys(range(4), step)
    stream.until(lambda: {item.block: item.step for item in stream.arrived} == newest)


def test_busy_jobs_are_served_by_their_weights(attach):
    packed = (pack(statistics(SIDE)),)
    streams = [attach(job, *[(SIDE,)] * BLOCKS) for job in ("heavy", "light")]
    for stream in streams:
        stream.send(*(PackedBlock(block, 1, packed) for block in range(BLOCKS)))
    answered = [0, 0]

    def offer_anew() -> None:
        for index, stream in enumerate(streams):
            for item in stream.arrived[answered[index] :]:
                answered[index] += 1
                stream.send(PackedBlock(item.block, item.step + 1, packed))

    def both_busy() -> bool:
        offer_anew()
        return all(len(stream.receipts) >= BLOCKS and stream.arrived for stream in streams)

    wait_for(both_busy, period=0.002)
    before = [*answered]

    def enough() -> bool:
        offer_anew()
        return sum(answered) - sum(before) >= 240  # the time of a worker that pauses is charged to its job

    wait_for(enough, period=0.002)
    heavy, light = (now - then for now, then in zip(answered, before, strict=True))
    assert 2 <= heavy / light <= 4.5, (heavy, light)
