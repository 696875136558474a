"""What a service says of its drain, and of sessions that come and go."""

from __future__ import annotations

import asyncio
import logging

import grpc
import pytest

from in_process_service import InProcessService
from preconditioner_service import logs, server, sessions
from raw_trainer import manifest, open_request, statistics, wait_for


@pytest.fixture
def service():
    service = InProcessService(token="token-of-a-test")
    yield service
    service.stop()


@pytest.fixture
def trainer(service):
    trainer = service.trainer("token-of-a-test")
    yield trainer
    trainer.channel.close()


def drained(service: InProcessService) -> bool:
    return asyncio.run_coroutine_threadsafe(service._run._service.drain(0.0), service._loop).result(20)


@pytest.mark.parametrize("at_work", [True, False])
def test_a_drain_that_is_cut_short_is_not_complete(service, trainer, at_work):
    trainer.open(open_request("job", manifest((4,))))
    stream = trainer.attach()
    wait_for(lambda: service._run._service._streams)
    if at_work:
        stream.snapshot(0, 1, statistics(4))
        stream.until(lambda: stream.receipts)
    service._loop.call_soon_threadsafe(service._run._service.end_streams)
    stream.until(lambda: stream.ended)
    wait_for(lambda: not service._run._service._streams)
    assert drained(service) is not at_work


def test_a_request_that_waits_when_a_drain_begins_opens_nothing(service, trainer, monkeypatch):
    class Plan(sessions.Plan):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments)
            assert drained(service)

    monkeypatch.setattr(server, "Plan", Plan)
    with pytest.raises(grpc.RpcError) as caught:
        trainer.open(open_request("job", manifest(*[(4,)] * 400)))  # checked in a thread
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "draining" in caught.value.details()
    assert not service._run._board.jobs


def test_who_opens_and_closes_again_and_again_does_not_fill_the_log(service, trainer, caplog, monkeypatch):
    monkeypatch.setattr(logs.LOGGER, "propagate", True)
    caplog.set_level(logging.INFO, logger=logs.LOGGER.name)
    for epoch in range(1, 21):
        trainer.open(open_request("again-and-again", manifest((4,)), epoch=epoch))
        trainer.attach().cancel()
        trainer.close()
    for name in ("session opened", "stream attached", "session closed"):
        assert len({record.fields["epoch"] for record in caplog.records if record.getMessage() == name}) == 1
