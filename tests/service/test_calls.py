"""Who waits for a first message, who is displaced, and whose turn it is to open a session."""

from __future__ import annotations

import asyncio
import threading

import grpc
import pytest

from preconditioner_protos import ManifestError
from preconditioner_service.calls import EndOfStream, WaitingRoom, abort, answer
from preconditioner_service.openings import Line, Openings

Code = grpc.StatusCode


class Caller:
    def __init__(self, host: str) -> None:
        self._host = host
        self.messages: asyncio.Queue = asyncio.Queue()
        self.takes = asyncio.Event()

    def peer(self) -> str:
        return f"ipv4:{self._host}:4711"

    async def read(self):
        return await self.messages.get()

    async def write(self, message) -> None:
        await self.takes.wait()

    async def abort(self, code, details) -> None:
        await self.takes.wait()
        self.ended = code


async def wait_all(room: WaitingRoom, *hosts: str):
    """As many calls, one after the other; and what becomes of them."""
    callers = [Caller(host) for host in hosts]
    calls = []
    for caller in callers:
        calls.append(asyncio.create_task(room.first_message(caller)))
        await asyncio.sleep(0)
    await asyncio.sleep(0.01)
    return callers, calls


def test_a_further_call_displaces_the_oldest_of_the_host_that_has_most():
    async def main() -> None:
        room = WaitingRoom(3, 30.0)
        callers, calls = await wait_all(room, "honest", "greedy", "greedy", "greedy", "other")
        for displaced in calls[1:3]:
            with pytest.raises(EndOfStream, match="max_waiting_calls") as caught:
                await displaced
            assert caught.value.code is Code.UNAVAILABLE
        assert len(room) == 3
        for caller, call in ((callers[0], calls[0]), (callers[3], calls[3]), (callers[4], calls[4])):
            caller.messages.put_nowait(b"first")
            assert await call == b"first"
        assert len(room) == 0

    asyncio.run(main())


def test_a_call_without_a_message_ends():
    async def main() -> None:
        for seconds, sent, named in (
            (0.05, (), "first_message_timeout"),
            (30.0, (grpc.aio.EOF,), "without a message"),
        ):
            room = WaitingRoom(3, seconds)
            (caller,), (call,) = await wait_all(room, "silent")
            for message in sent:
                caller.messages.put_nowait(message)
            with pytest.raises(EndOfStream, match=named) as caught:
                await call
            assert caught.value.code is Code.INVALID_ARGUMENT
            assert len(room) == 0

    asyncio.run(main())


def test_an_answer_or_status_that_is_not_taken_ends_the_call():
    async def main() -> None:
        caller = Caller("host")
        with pytest.raises(asyncio.CancelledError):
            await answer(caller, b"", 0.05)
        with pytest.raises(asyncio.CancelledError):
            await abort(caller, EndOfStream(Code.ABORTED, "superseded"), 0.05)
        caller.takes.set()
        await answer(caller, b"", 0.05)
        await abort(caller, EndOfStream(Code.ABORTED, "superseded"), 0.05)
        assert caller.ended is Code.ABORTED

    asyncio.run(main())


def test_large_requests_take_turns_and_small_ones_do_not_wait():
    async def main() -> None:
        openings = Openings()
        order: list[str] = []

        async def large(name: str) -> None:
            async with openings.turn(2**20, name) as run:
                assert await run(lambda: name) == name
                order.append(f"{name} begins")
                await asyncio.sleep(0.02)
                order.append(f"{name} ends")

        in_line = [asyncio.create_task(large(str(number))) for number in range(8)]
        await asyncio.sleep(0.01)
        with pytest.raises(EndOfStream, match="in line") as caught:
            await large("too many")
        assert caught.value.code is Code.UNAVAILABLE
        async with openings.turn(100, "small") as run:
            assert await run(lambda: 1) == 1
        await asyncio.gather(*in_line[:2])
        assert order[:4] == ["0 begins", "0 ends", "1 begins", "1 ends"]
        for task in in_line:
            task.cancel()
        await asyncio.gather(*in_line, return_exceptions=True)

    asyncio.run(main())


def test_requests_of_a_middle_size_are_checked_beside_the_loop_one_at_a_time_and_none_is_refused():
    async def main() -> None:
        openings = Openings()
        threads: set[int] = set()
        under_way: list[int] = []

        def work(number: int) -> int:
            threads.add(threading.get_ident())
            under_way.append(number)
            assert len(under_way) == 1
            threading.Event().wait(0.001)
            under_way.remove(number)
            return number

        async def middle(number: int) -> int:
            async with openings.turn(20_000, "caller") as run:
                return await run(work, number)

        async with openings.turn(2**20, "caller"):  # a large one holds up none of them
            assert await asyncio.gather(*map(middle, range(50))) == list(range(50))
        assert threading.get_ident() not in threads

    asyncio.run(main())


def test_a_call_that_is_reset_keeps_its_turn_until_its_thread_is_done():
    async def main() -> None:
        openings = Openings()
        goes_on, begun = threading.Event(), []

        def work(number: int) -> None:
            begun.append(number)
            assert goes_on.wait(20)
            raise ManifestError("of a call that is gone")

        async def large(number: int) -> None:
            async with openings.turn(2**20, number) as run:
                await run(work, number)

        calls = [asyncio.create_task(large(number)) for number in range(2)]
        while not begun:
            await asyncio.sleep(0.01)
        calls[0].cancel()
        await asyncio.sleep(0.1)
        assert begun == [0]
        assert not calls[0].done()
        goes_on.set()
        ended = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(error) for error in ended] == [asyncio.CancelledError, ManifestError]
        assert begun == [0, 1]

    asyncio.run(main())


async def in_line(line: Line, order: list[str], *callers: str) -> list[asyncio.Task]:
    """As many requests, each of which notes its turn."""

    async def request(caller: str) -> None:
        async with line.turn(caller):
            order.append(caller)
            await asyncio.sleep(0)

    tasks = [asyncio.create_task(request(caller)) for caller in callers]
    await asyncio.sleep(0)
    return tasks


def test_callers_take_turns_however_many_requests_each_has_in_line():
    async def main() -> None:
        line, order = Line(10), []
        async with line.turn("greedy"):
            tasks = await in_line(line, order, *["greedy"] * 6, "other", "third")
        await asyncio.gather(*tasks)
        assert order == ["greedy", "other", "third", *["greedy"] * 5]
        async with line.turn("greedy"):
            pass  # it is free again

    asyncio.run(main())


def test_a_full_line_refuses_the_last_of_the_caller_that_has_most():
    async def main() -> None:
        line, order = Line(4), []
        async with line.turn("greedy"):
            tasks = await in_line(line, order, *["greedy"] * 5, "other", "other", "other")
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        refused = [number for number, end in enumerate(ended) if end is not None]
        assert refused == [2, 3, 4, 7]
        for number in refused:
            assert ended[number].code is Code.UNAVAILABLE
            assert "4 requests with manifests are in line" in str(ended[number])
        assert order == ["greedy", "other", "greedy", "other"]

    asyncio.run(main())


def test_requests_that_are_reset_in_line_leave_it_and_pass_their_turn_on():
    async def main() -> None:
        line, order = Line(4), []
        async with line.turn("holder"):
            gone, handed, last = await in_line(line, order, "gone", "handed", "last")
            gone.cancel()
            await asyncio.gather(gone, return_exceptions=True)
        handed.cancel()  # it has the turn and did not yet hear of it
        await asyncio.wait_for(last, 20)
        assert handed.cancelled()
        assert order == ["last"]

    asyncio.run(main())
