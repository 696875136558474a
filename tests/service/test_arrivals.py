"""How many calls begin a second, and that resets take no more of the service than that."""

from __future__ import annotations

import asyncio
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from in_process_service import InProcessService
from preconditioner_protos.v1 import preconditioner_pb2 as pb
from preconditioner_service import logs
from preconditioner_service.arrivals import Arrivals, pace_arrivals
from preconditioner_service.auth import BearerToken
from raw_http2 import SERVICE, Connection

TOKEN = "a-token-for-arrivals-0123456789"
RATE = 50


@given(
    rate=st.floats(0.5, 1000.0),
    gaps=st.lists(st.floats(0.0, 2.0), max_size=200),
)
def test_no_time_has_more_calls_than_its_rate_and_those_of_one_second(rate, gaps):
    now, begun = 0.0, []
    arrivals = Arrivals(rate, lambda: now)
    for gap in gaps:
        now += gap
        now += arrivals.take()
        begun.append(now)
    most = max(rate, 1.0)
    for first, since in enumerate(begun):
        for last in range(first, len(begun)):
            assert last - first + 1 <= most + rate * (begun[last] - since) + 1 + 1e-6


def test_calls_below_the_rate_never_wait():
    now = 0.0
    arrivals = Arrivals(10.0, lambda: now)
    for _ in range(1000):
        assert arrivals.take() == 0.0
        now += 0.1 + 1e-9


def test_the_task_that_accepts_calls_is_ended_and_fails_as_before():
    async def accepting(future):
        try:
            return await future
        except asyncio.CancelledError:
            return "cancelled"

    accepting.__qualname__ = "AioServer._server_main_loop"

    async def main() -> None:
        loop = asyncio.get_running_loop()
        for end, result in (
            (lambda task, future: future.set_result("call"), "call"),
            (lambda task, future: task.cancel(), "cancelled"),
        ):
            pace_arrivals(loop, Arrivals(1000.0))
            future = loop.create_future()
            task = loop.create_task(accepting(future))
            await asyncio.sleep(0)
            end(task, future)
            assert await task == result
        pace_arrivals(loop, Arrivals(1000.0))
        future = loop.create_future()
        task = loop.create_task(accepting(future))
        future.set_exception(RuntimeError("the queue is shut down"))
        with pytest.raises(RuntimeError, match="shut down"):
            await task

    asyncio.run(main())


def test_a_grpc_that_accepts_calls_otherwise_is_told_of_once_and_left_alone(caplog, monkeypatch):
    monkeypatch.setattr(logs.LOGGER, "propagate", True)

    async def otherwise() -> None:
        pass

    async def main(name: str) -> list[str]:
        loop = asyncio.get_running_loop()
        started = pace_arrivals(loop, Arrivals(1000.0))
        accepting = otherwise()
        accepting.__qualname__ = name
        await loop.create_task(accepting)
        for _ in range(2):
            started()
        assert loop.get_task_factory() is None
        return [record.getMessage() for record in caplog.records]

    assert asyncio.run(main("AioServer._server_main_loop")) == []
    assert asyncio.run(main("AioServer._accept")) == ["max_call_rate is not held"]


@pytest.fixture
def begun(monkeypatch):
    """The calls that the service began."""
    calls = []
    usual = BearerToken.intercept_service

    async def counted(self, continuation, details):
        calls.append(details.method)
        return await usual(self, continuation, details)

    monkeypatch.setattr(BearerToken, "intercept_service", counted)
    return calls


@pytest.fixture
def service():
    """It has room for all calls of a test: the message of a call may come later than 16 calls after it, and
    which of them are displaced is not the rate's."""
    service = InProcessService(token=TOKEN, max_call_rate=RATE, max_waiting_calls=2000)
    yield service
    service.stop()


def test_calls_beyond_the_rate_wait_and_are_answered(service):
    trainer = service.trainer(TOKEN)
    began = time.monotonic()
    request = pb.GetStatusRequest()
    calls = [
        trainer.stub.GetStatus.future(request, metadata=trainer.metadata, timeout=30) for _ in range(2 * RATE)
    ]
    assert all(call.result().protocol_version_max for call in calls)
    assert time.monotonic() - began > 0.9
    trainer.channel.close()


def test_calls_that_are_reset_while_they_wait_never_begin(begun, service):
    resets = 1000
    began = time.monotonic()
    connection = Connection(service.address)
    for _ in range(resets):
        connection.state.reset_stream(connection.call(f"{SERVICE}Exchange", TOKEN))
        connection.flush()
    trainer = service.trainer(TOKEN)
    assert trainer.status().protocol_version_max, "others have their turn"
    count = len(begun)
    seconds = time.monotonic() - began
    assert count <= RATE * (1 + seconds) + 2
    assert count < resets
    trainer.channel.close()
    connection.close()
