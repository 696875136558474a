"""Whether Ray is there: before it is joined, and for as long as it is used."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable
from typing import Any

_REACH_TIMEOUT = 5.0
_PERIOD = 5.0
PATIENCE = 30.0
"""Seconds without an answer after which Ray is lost. After 60 Ray ends its driver's process from within."""


def check_reachable(address: str) -> None:
    """Ray itself tries for minutes to reach a head that is not there.

    Raises:
        ConnectionError: nothing answers.
    """
    host, separator, port = address.rpartition(":")
    if not separator or not port.isdecimal():
        return  # "auto", which Ray looks up
    try:
        socket.create_connection((host.strip("[]"), int(port)), _REACH_TIMEOUT).close()
    except OSError as error:
        raise ConnectionError(
            f"Ray at {address} cannot be reached ({error.strerror or error}): is its head running, and "
            "is this the address that 'ray start' named?"
        ) from None


async def until_lost(
    node_is_alive: Callable[[], bool], *, patience: float = PATIENCE, period: float = _PERIOD
) -> str:
    """Return, with the reason, once Ray's head or the node of this process is gone for good.

    A process cannot change to another Ray, nor to the same head restarted, which knows nothing of it.

    Args:
        node_is_alive: asks the head; may block, or raise.
        patience: seconds without an answer that are borne.
        period: seconds between two questions.
    """
    loop = asyncio.get_running_loop()
    answered, unanswered, why = loop.time(), 0, ""
    # Two questions at least: time alone passes for a process that was stopped, too.
    while unanswered < 2 or loop.time() - answered < patience:
        await asyncio.sleep(period)
        try:
            alive = await asyncio.wait_for(_in_thread(node_is_alive), patience / 2)
        except asyncio.TimeoutError:
            unanswered, why = unanswered + 1, "no answer"
        except Exception as error:
            unanswered, why = unanswered + 1, str(error) or type(error).__name__
        else:
            if not alive:
                return "its head has declared this host's node dead"
            answered, unanswered = loop.time(), 0
    return f"its head has not answered for {patience:.0f} s ({why})"


def _in_thread(function: Callable[[], bool]) -> asyncio.Future[bool]:
    """In a thread that nobody waits for when the process ends, as a question to a dead head hangs."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[bool] = loop.create_future()

    def settle(result: bool, error: Exception | None) -> None:
        if future.done():
            return  # given up
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)

    def ask() -> None:
        result, problem = False, None
        try:
            result = function()
        except Exception as error:
            problem = error
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(settle, result, problem)

    threading.Thread(target=ask, name="ray-alive", daemon=True).start()
    return future


def node_is_alive(ray: Any, node_id: str) -> bool:
    """Ask Ray's head about a node."""
    return any(node["Alive"] for node in ray.nodes() if node["NodeID"] == node_id)
