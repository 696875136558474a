"""Which call ends with which status, and who takes over from whom."""

from __future__ import annotations

import math

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from preconditioner_protos.v1 import preconditioner_pb2 as pb
from raw_trainer import expected_root, manifest, open_request, statistics, wait_for

Code = grpc.StatusCode


def refusal(trainer, request) -> tuple[Code, str]:
    with pytest.raises(grpc.RpcError) as caught:
        trainer.open(request)
    return caught.value.code(), caught.value.details()


@pytest.mark.parametrize(
    "metadata", [None, "Bearer wrong", "Bearer ", "a-token-of-the-tests-7f3a", "Basic x"]
)
def test_every_call_needs_the_token(service, job, metadata):
    trainer = service.trainer()
    trainer.metadata = () if metadata is None else (("authorization", metadata),)
    calls = [
        lambda: trainer.status(),
        lambda: trainer.open(open_request(job, manifest((4,)))),
        lambda: trainer.stub.CloseSession(pb.CloseSessionRequest(), metadata=trainer.metadata),
    ]
    for call in calls:
        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert caught.value.code() is Code.UNAUTHENTICATED
        assert "authorization: Bearer TOKEN" in caught.value.details()
    stream = trainer.stream()  # nothing is sent: the refusal does not wait for it
    stream.until(lambda: stream.ended)
    assert stream.code is Code.UNAUTHENTICATED
    trainer.channel.close()


def test_two_tokens_are_none(service):
    trainer = service.trainer()
    trainer.metadata = (*trainer.metadata, ("authorization", "Bearer other"))
    with pytest.raises(grpc.RpcError) as caught:
        trainer.status()
    assert caught.value.code() is Code.UNAUTHENTICATED
    trainer.channel.close()


def test_health_is_open_and_names_the_service(trainer):
    health = health_pb2_grpc.HealthStub(trainer.channel)
    for name in ("", "preconditioner_protos.v1.PreconditionerService"):
        answer = health.Check(health_pb2.HealthCheckRequest(service=name))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as caught:
        health.Check(health_pb2.HealthCheckRequest(service="other"))
    assert caught.value.code() is Code.NOT_FOUND


def test_reflection_behind_its_flag_needs_the_token(trainer):
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    stub = reflection_pb2_grpc.ServerReflectionStub(trainer.channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    with pytest.raises(grpc.RpcError):
        list(stub.ServerReflectionInfo(iter([request])))
    (answer,) = stub.ServerReflectionInfo(iter([request]), metadata=trainer.metadata)
    names = {service.name for service in answer.list_services_response.service}
    assert "preconditioner_protos.v1.PreconditionerService" in names


@pytest.mark.parametrize("version", [0, 2])
def test_other_protocol_versions(trainer, job, version):
    code, details = refusal(trainer, open_request(job, manifest((4,)), protocol_version=version))
    assert code is Code.FAILED_PRECONDITION
    assert f"protocol_version {version}" in details


def _changed(blocks: pb.Manifest, change) -> pb.Manifest:
    change(blocks)
    return blocks


@pytest.mark.parametrize(
    ("request_", "named"),
    [
        (open_request("bad", manifest((0,))), "sides[0].length"),
        (open_request("bad", manifest(())), "has no side"),
        (open_request("bad", manifest((4,), order=0.0)), "root_order"),
        (open_request("bad", manifest((4,), order=math.nan)), "root_order"),
        (open_request("bad", manifest((4,), ridge=-1.0)), "ridge.value"),
        (open_request("bad", manifest((4,), dtype=0)), "dtype"),
        (open_request("bad", manifest((4,), dtype=9)), "dtype"),
        (
            open_request("bad", pb.Manifest(blocks=[pb.Block(sides=[pb.Side(length=4, root_order=4)])])),
            "dtype",
        ),
        (open_request("bad job", manifest((4,))), "job"),
        (open_request("", manifest((4,))), "job"),
        (open_request("bad", manifest((4,)), rank=1), "rank"),
        (open_request("bad", manifest((4,)), world_size=0), "world_size"),
        (
            open_request("bad", _changed(manifest((4,)), lambda m: setattr(m.blocks[0], "name", "x" * 600))),
            "name",
        ),
        (
            open_request("bad", _changed(manifest((4,)), lambda m: setattr(m.blocks[0].ridge, "kind", 17))),
            "ridge.kind",
        ),
    ],
)
def test_requests_that_contradict_the_protocol(trainer, request_, named):
    code, details = refusal(trainer, request_)
    assert code is Code.INVALID_ARGUMENT
    assert named in details


@pytest.mark.parametrize(
    ("blocks", "named"),
    [
        (manifest((2049,)), "side of 2049"),
        (manifest((2**32 - 1,)), "side of 4294967295"),
        (manifest(*[(1,)] * 2001), "more blocks than the 2000"),
        (manifest(*[(2048, 2048)] * 20), "bytes"),
        (manifest((4,), in_flight=2**31), "snapshots_in_flight"),
    ],
)
def test_quotas(trainer, job, blocks, named):
    code, details = refusal(trainer, open_request(job, blocks))
    assert code is Code.RESOURCE_EXHAUSTED
    assert named in details


def test_the_quota_of_bytes_counts_all_ranks_of_a_job(service, job):
    blocks = manifest(*[(2048, 2048)] * 3)
    first, second = service.trainer(), service.trainer()
    first.open(open_request(job, blocks, rank=0, world_size=2))
    code, details = refusal(second, open_request(job, blocks, rank=1, world_size=2))
    assert code is Code.RESOURCE_EXHAUSTED
    assert "(max_job_bytes)" in details
    # Another job has a quota of its own.
    second.open(open_request(job + "-other", blocks))
    # The same rank again, and a newer epoch, replace and do not add.
    first.open(open_request(job, blocks, rank=0, world_size=2))
    first.open(open_request(job, blocks, rank=0, world_size=2, epoch=2))
    for trainer in (first, second):
        trainer.close()
        trainer.channel.close()


def test_an_oversized_message_ends_the_call_alone(trainer, job):
    trainer.open(open_request(job, manifest((4,))))
    stream = trainer.attach()
    stream.put(chunks=pb.Chunks(chunks=[pb.MatrixChunk(payload=bytes(5 << 20))]))
    stream.until(lambda: stream.ended)
    assert stream.code is Code.RESOURCE_EXHAUSTED
    assert trainer.status().workers >= 1


def test_opening_is_idempotent(trainer, job):
    request = open_request(job, manifest((4,), (5,)))
    first, second = trainer.open(request), trainer.open(request)
    assert first.session_id == second.session_id
    assert first.service_id
    assert [list(front.blocks) for front in first.placement.fronts] == [[]]
    assert first.limits.session_ttl_seconds == 8
    code, details = refusal(trainer, open_request(job, manifest((4,), (6,))))
    assert code is Code.INVALID_ARGUMENT
    assert "larger epoch" in details


def test_a_newer_epoch_fences_the_older_ones(service, trainer, job):
    trainer.open(open_request(job, manifest((4,)), epoch=7))
    stream = trainer.attach()
    newer = service.trainer()
    newer.open(open_request(job, manifest((4,)), epoch=8))
    stream.until(lambda: stream.ended)
    assert stream.code is Code.ABORTED
    assert "epoch 8" in stream.details
    assert refusal(trainer, open_request(job, manifest((4,)), epoch=7))[0] is Code.ABORTED
    again = trainer.attach()
    again.until(lambda: again.ended)
    assert again.code is Code.FAILED_PRECONDITION
    other_job = service.trainer()
    other_job.open(open_request(job + "-other", manifest((4,)), epoch=1))
    newer.close()
    # Also when nobody of the newer epoch is left.
    assert refusal(trainer, open_request(job, manifest((4,)), epoch=7))[0] is Code.ABORTED
    for each in (newer, other_job):
        each.channel.close()


def test_fencing_reaches_all_ranks(service, job):
    ranks = [service.trainer() for _ in range(2)]
    streams = []
    for rank, trainer in enumerate(ranks):
        trainer.open(open_request(job, manifest((4,)), rank=rank, world_size=2, epoch=1))
        streams.append(trainer.attach())
    assert ranks[0].job_status().ranks == 2
    newer = service.trainer()
    newer.open(open_request(job, manifest((4,)), rank=0, world_size=2, epoch=2))
    for stream in streams:
        stream.until(lambda stream=stream: stream.ended)
        assert stream.code is Code.ABORTED
    newer.close()
    for trainer in (*ranks, newer):
        trainer.channel.close()


def test_a_second_attach_supersedes_the_first(trainer, job):
    trainer.open(open_request(job, manifest((16,))))
    first = trainer.attach(answer=False)
    first.snapshot(0, 1, statistics(16))
    first.until(lambda: first.arrived)
    second = trainer.attach()
    first.until(lambda: first.ended)
    assert first.code is Code.ABORTED
    assert "newer stream" in first.details
    # What had no receipt comes again, and the new stream is fully alive.
    second.until(lambda: second.versions() == [(0, 1)])
    second.snapshot(0, 2, statistics(16))
    second.until(lambda: (0, 2) in second.versions())


def test_reattaching_after_a_broken_stream(trainer, job):
    trainer.open(open_request(job, manifest((16,), (16,))))
    first = trainer.attach(answer=False)
    first.snapshot(0, 1, statistics(16))
    first.snapshot(1, 1, statistics(16))
    first.until(lambda: len(first.arrived) == 2)
    first.receipt(0, 1)
    first.snapshot(0, 1, statistics(16))  # its Nack tells that the receipt before it was read
    first.until(lambda: first.nacks)
    first.cancel()
    first.until(lambda: first.ended)
    second = trainer.attach()
    second.until(lambda: second.arrived)
    assert second.versions() == [(1, 1)]
    # The trainer offers its newest again: an answer, and no harm.
    second.snapshot(1, 1, statistics(16))
    second.until(lambda: second.nacks)
    assert second.nacks[0].reason == pb.NACK_REASON_OUTDATED


def test_work_goes_on_while_no_stream_is_there(start, job):
    trainer = start("--num-workers=1", "--session-ttl=60").trainer()
    trainer.open(open_request(job, manifest((512, 512))))
    first = trainer.attach()
    matrix = statistics(512)
    first.snapshot(0, 1, matrix, matrix)
    first.until(lambda: first.receipts)
    first.cancel()
    wait_for(lambda: trainer.job_status().preconditioners_published == 1)
    second = trainer.attach()
    second.until(lambda: second.arrived)
    assert abs(second.root(0, 1) - expected_root(matrix)).max() < 1e-5
    trainer.channel.close()


def test_a_session_outlives_its_stream_by_its_ttl_only(trainer, job):
    trainer.open(open_request(job, manifest((4,))))
    trainer.attach().cancel()
    wait_for(lambda: job not in [status.job for status in trainer.status().jobs if status.ranks], timeout=16)
    stream = trainer.attach()
    stream.until(lambda: stream.ended)
    assert stream.code is Code.FAILED_PRECONDITION
    # From there the trainer starts again, in the same epoch.
    trainer.open(open_request(job, manifest((4,))))
    stream = trainer.attach()
    stream.snapshot(0, 1, statistics(4))
    stream.until(lambda: stream.arrived)


def test_unknown_session(trainer, job):
    trainer.open(open_request(job, manifest((4,))))
    for attach in (pb.Attach(session_id="nobody", epoch=1), pb.Attach()):
        stream = trainer.stream(pb.TrainerMessage(attach=attach))
        stream.until(lambda stream=stream: stream.ended)
        assert stream.code is Code.FAILED_PRECONDITION
    trainer.stub.CloseSession(pb.CloseSessionRequest(session_id="nobody"), metadata=trainer.metadata)


def test_attach_comes_first_once_and_in_the_sessions_epoch(trainer, job):
    opened = trainer.open(open_request(job, manifest((4,))))
    not_first = trainer.stream(pb.TrainerMessage(receipts=pb.Receipts()))
    empty = trainer.stream(pb.TrainerMessage())
    other_epoch = trainer.stream(pb.TrainerMessage(attach=pb.Attach(session_id=opened.session_id, epoch=2)))
    nothing = trainer.stream()
    nothing.half_close()
    twice = trainer.attach()
    twice.put(attach=pb.Attach(session_id=opened.session_id, epoch=1))
    for stream in (not_first, empty, other_epoch, nothing, twice):
        stream.until(lambda stream=stream: stream.ended)
        assert stream.code is Code.INVALID_ARGUMENT


def test_messages_of_a_later_revision_are_ignored(trainer, job):
    trainer.open(open_request(job, manifest((4,))))
    stream = trainer.attach()
    stream.put()
    stream._requests.put(pb.TrainerMessage.FromString(b"\xfa\x01\x02hi"))  # field 31
    stream.snapshot(0, 1, statistics(4))
    stream.until(lambda: stream.arrived)


def test_closing_frees_and_ends_the_stream(trainer, job):
    trainer.open(open_request(job, manifest((4,))))
    stream = trainer.attach()
    trainer.close()
    stream.until(lambda: stream.ended)
    assert stream.code is Code.ABORTED
    assert job not in [status.job for status in trainer.status().jobs if status.ranks]
    trainer.close()


def test_status(trainer, job):
    status = trainer.status()
    assert (status.protocol_version_min, status.protocol_version_max) == (1, 1)
    assert status.workers >= 1
    assert not status.draining
    assert status.service_version
    trainer.open(open_request(job, manifest((4,), (4,)), epoch=3))
    stream = trainer.attach()
    stream.snapshot(0, 1, statistics(4))
    stream.snapshot(0, 1, statistics(4))
    stream.until(lambda: stream.arrived and stream.nacks)
    own = trainer.job_status()
    assert (own.epoch, own.ranks, own.blocks) == (3, 1, 2)
    assert (own.snapshots_received, own.preconditioners_published, own.nacks) == (1, 1, 1)
    assert (own.blocks_pending, own.blocks_in_flight) == (0, 0)
