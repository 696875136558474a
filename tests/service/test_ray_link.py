"""When Ray counts as lost."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from preconditioner_service.ray_link import check_reachable, until_lost
from service_process import free_port


def lost(question, patience=0.3):
    began = time.monotonic()
    why = asyncio.run(asyncio.wait_for(until_lost(question, patience=patience, period=0.02), 20))
    return why, time.monotonic() - began


def test_a_head_that_answers_is_not_lost():
    answers = iter([True] * 40 + [False])
    why, seconds = lost(lambda: next(answers))
    assert "this host's node dead" in why
    assert seconds > 0.6, "twice the patience, and it answered all the time"


def test_a_head_that_hangs_is_lost():
    answers = iter([True])
    hanging = threading.Event()
    why, seconds = lost(lambda: next(answers, None) or hanging.wait(20))
    hanging.set()
    assert "has not answered for" in why
    assert 0.3 <= seconds < 10


def test_a_head_that_errs_has_the_same_patience():
    def question():
        if next(errors):
            raise RuntimeError("GCS is unavailable")
        return True

    errors = iter([True, True, False, *[True] * 10_000])
    why, seconds = lost(question)
    assert "GCS is unavailable" in why
    assert seconds >= 0.3


def test_nobody_listens():
    with pytest.raises(ConnectionError, match="is its head running"):
        check_reachable(f"127.0.0.1:{free_port()}")
    check_reachable("auto")
