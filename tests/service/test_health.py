"""The health service, which is open to everybody, and holds nothing for those who abuse it."""

from __future__ import annotations

import contextlib

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from in_process_service import InProcessService
from raw_http2 import SERVICE, Connection, framed
from raw_trainer import wait_for

CHECK, WATCH = "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"
TOKEN = "token-of-a-test"


@pytest.fixture
def serving():
    with contextlib.ExitStack() as stack:

        def start(**settings: object) -> InProcessService:
            service = InProcessService(token=TOKEN, **settings)
            stack.callback(service.stop)
            return service

        yield start


def answered(service: InProcessService) -> bool:
    trainer = service.trainer(TOKEN)
    try:
        return trainer.status().protocol_version_max > 0
    except grpc.RpcError:
        return False
    finally:
        trainer.channel.close()


@pytest.mark.parametrize("method", [CHECK, WATCH])
def test_calls_that_never_send_their_message_keep_no_trainer_out(serving, method):
    service = serving(max_streams=8, max_waiting_calls=4)
    connection = Connection(service.address)
    for _ in range(7):
        connection.call(method, None)
    wait_for(lambda: connection.receive(0.02) or connection.statuses["UNAVAILABLE"] == 3)
    assert answered(service)
    connection.close()


@pytest.mark.parametrize("method", [CHECK, WATCH, f"{SERVICE}GetStatus"])
def test_answers_that_are_not_taken_keep_no_place(serving, method):
    service = serving(max_streams=8, answer_timeout=0.2)
    connection = Connection(service.address, window=0)
    for _ in range(8):
        connection.send(connection.call(method, TOKEN), framed(b""), end=True)
    wait_for(lambda: connection.receive(0.02) or connection.statuses["CANCELLED"])
    wait_for(lambda: answered(service))
    connection.close()


def test_a_watcher_is_told_of_changes_and_has_a_place_of_a_few(serving):
    service = serving(max_health_watchers=1)
    trainer = service.trainer(TOKEN)
    health = health_pb2_grpc.HealthStub(trainer.channel)
    states = health_pb2.HealthCheckResponse
    with pytest.raises(grpc.RpcError) as caught:
        next(health.Watch(health_pb2.HealthCheckRequest(service="other")))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    watch = health.Watch(health_pb2.HealthCheckRequest())
    assert next(watch).status == states.NOT_SERVING
    with pytest.raises(grpc.RpcError, match="max_health_watchers") as caught:
        next(health.Watch(health_pb2.HealthCheckRequest()))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    service._loop.call_soon_threadsafe(service._run._health.set, True)
    assert next(watch).status == states.SERVING
    assert health.Check(health_pb2.HealthCheckRequest()).status == states.SERVING
    watch.cancel()
    wait_for(lambda: not service._run._health.watchers)
    trainer.channel.close()
