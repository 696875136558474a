"""Recording: nothing waits for the disk, a kill costs the last lines, and what is missing is known."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from preconditioner_protos import pack
from preconditioner_protos.history import (
    Event,
    HistoryError,
    HistoryRecorder,
    Kind,
    Scope,
    digest_of,
    load_matrix,
    read_history,
    recorder,
)

SCOPE = Scope("job", 1, 7)


def lines(path):
    return path.read_text().splitlines()


def symmetric(n, seed=0):
    half = np.random.default_rng(seed).standard_normal((n, n)).astype(np.float32)
    return half + half.T


def test_what_is_recorded_is_read_back(tmp_path):
    path = tmp_path / "a.jsonl"
    before = time.monotonic()
    writer = HistoryRecorder(path, "trainer")
    writer.record(Kind.STEP_BEGUN, SCOPE, step=3)
    writer.record(Kind.ADOPTED, SCOPE, block=2, version=1, step=3, sides=[symmetric(4)])
    writer.record(Kind.DRAIN_ENDED, complete=True)
    writer.close()
    writer.record(Kind.DRAIN_ENDED, complete=True)  # too late, and no error
    history = read_history([path])
    assert [e.kind for e in history.events] == [
        Kind.RECORDER_OPENED, Kind.STEP_BEGUN, Kind.ADOPTED, Kind.DRAIN_ENDED, Kind.RECORDER_CLOSED
    ]  # fmt: skip
    adopted = history.events[2]
    assert (adopted.job, adopted.rank, adopted.epoch) == SCOPE
    assert (adopted.block, adopted.version, adopted.step) == (2, 1, 3)
    assert adopted.data == {"digests": [digest_of(symmetric(4))]}
    assert before <= adopted.at <= time.monotonic()
    (source,) = history.sources.values()
    assert (source.role, source.closed, source.missing, history.torn) == ("trainer", True, 0, 0)


def test_a_matrix_has_one_name_packed_or_full_and_is_saved_under_it(tmp_path):
    matrix = symmetric(6)
    writer = HistoryRecorder(tmp_path / "a.jsonl", "trainer", tmp_path / "m")
    writer.record(Kind.SNAPSHOT_SENT, SCOPE, block=0, version=0, sides=[pack(matrix)])
    writer.record(Kind.RECEIVED, SCOPE, block=0, version=0, sides=[matrix])
    writer.close()
    sent, received = (e.data["digests"] for e in read_history([tmp_path / "a.jsonl"]).events[1:3])
    assert sent == received == [digest_of(matrix)]
    np.testing.assert_array_equal(load_matrix(tmp_path / "m", sent[0]), pack(matrix))
    assert load_matrix(tmp_path / "m", "0" * 32) is None
    file = tmp_path / "m" / f"{sent[0]}.npy"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert load_matrix(tmp_path / "m", sent[0]) is None


def test_a_killed_process_loses_its_last_moment_alone(tmp_path):
    path = tmp_path / "a.jsonl"
    program = (
        "import sys, time\n"
        "from preconditioner_protos.history import *\n"
        "writer = HistoryRecorder(sys.argv[1], 'trainer')\n"
        "for step in range(10**9):\n"
        "    writer.record(Kind.STEP_BEGUN, Scope('job', 0, 1), step=step)\n"
        "    if step % 100 == 0: print(step, time.monotonic(), flush=True); time.sleep(0.002)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE) as process:
        said = [process.stdout.readline().split() for _ in range(100)]
        while Kind.STEP_BEGUN.value.encode() not in path.read_bytes():
            said.append(process.stdout.readline().split())
        process.send_signal(signal.SIGKILL)
        killed = time.monotonic()
    history = read_history([path])
    (source,) = history.sources.values()
    assert (source.closed, source.missing) == (False, 0)
    assert history.torn <= 1
    old = [int(step) for step, at in said if float(at) < killed - 1.0]
    assert history.events[-1].step >= max(old, default=0)
    # The next writer ends the torn line before it goes on. One that is torn already only grows longer here.
    path.write_bytes(path.read_bytes() + b'{"v":1,"kind":"tra')
    HistoryRecorder(path, "trainer").close()
    again = read_history([path])
    assert again.torn == 1
    assert len(again.sources) == 2


def test_recording_never_waits_for_a_disk_that_hangs(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        writer = HistoryRecorder(path, "trainer")
        # More than a pipe holds, so that the writing thread stands still.
        began = time.monotonic()
        for step in range(5000):
            writer.record(Kind.STEP_BEGUN, SCOPE, step=step)
        assert time.monotonic() - began < 2.0
        assert not writer.flush(0.2)
    finally:
        os.close(reader)
        writer.close()


def test_what_does_not_fit_the_queue_is_dropped_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(recorder, "MAX_EVENTS", 10)
    writer = HistoryRecorder(tmp_path / "a.jsonl", "trainer")
    assert writer.flush()
    with writer._lock:  # nothing is taken from the queue meanwhile
        for step in range(100):
            writer.record(Kind.STEP_BEGUN, SCOPE, step=step)
    assert writer.flush()
    writer.record(Kind.STEP_BEGUN, SCOPE, step=100)
    writer.close()
    history = read_history([tmp_path / "a.jsonl"])
    (lost,) = [e for e in history.events if e.kind is Kind.RECORDER_LOST]
    assert lost.data["events"] == history.holes == 90
    assert history.events[-2].step == 100


def test_matrices_beyond_the_bound_are_not_held(tmp_path, monkeypatch):
    monkeypatch.setattr(recorder, "MAX_MATRIX_BYTES", 100)
    writer = HistoryRecorder(tmp_path / "a.jsonl", "trainer")
    with writer._lock:  # nothing is taken from the queue meanwhile
        for version in range(2):
            writer.record(Kind.RECEIVED, SCOPE, block=0, version=version, sides=[symmetric(4)])
    writer.close()
    first, second = read_history([tmp_path / "a.jsonl"]).events[1:3]
    assert first.data["digests"]
    assert second.data["digests"] is None


def test_a_full_disk_is_survived_and_its_hole_is_known(tmp_path):
    path = tmp_path / "a.jsonl"
    program = (
        "import resource, signal, sys\n"
        "from preconditioner_protos.history import *\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "writer = HistoryRecorder(sys.argv[1], 'trainer')\n"
        "def say(first, last):\n"
        "    for step in range(first, last): writer.record(Kind.STEP_BEGUN, Scope('job', 0, 1), step=step)\n"
        "    assert writer.flush()\n"
        "say(0, 10)\n"
        "hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))\n"
        "say(10, 100)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))\n"
        "say(100, 110)\n"
        "writer.close()\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("events are lost") == 1
    history = read_history([path])
    steps = [e.step for e in history.events if e.kind is Kind.STEP_BEGUN]
    assert steps[:10] == list(range(10))
    assert steps[-10:] == list(range(100, 110))
    (lost,) = [e for e in history.events if e.kind is Kind.RECORDER_LOST]
    assert lost.data["events"] >= history.holes > 0
    assert history.torn == 1


def test_a_forked_child_records_nothing(tmp_path):
    writer = HistoryRecorder(tmp_path / "a.jsonl", "trainer")
    child = os.fork()
    if child == 0:
        writer.record(Kind.STEP_BEGUN, SCOPE, step=1)
        writer.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    writer.close()
    assert len(lines(tmp_path / "a.jsonl")) == 2


def test_several_recorders_share_a_file(tmp_path):
    path = tmp_path / "a.jsonl"
    writers = [HistoryRecorder(path, "trainer") for _ in range(3)]
    for step in range(300):
        for writer in writers:
            writer.record(Kind.STEP_BEGUN, SCOPE, step=step)
    for writer in writers:
        writer.close()
    history = read_history([path])
    assert (len(history.sources), history.holes, history.torn) == (3, 0, 0)
    assert len(history.events) == 3 * 302


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": 2}, "format 2"),
        ({"kind": "trainer.flew"}, "unknown kind 'trainer.flew'"),
        ({"step": "3"}, "step = '3'"),
        ({"at": float("nan")}, "at = nan"),
        ({"epoch": None}, "trainer.step_begun"),
    ],
)
def test_what_is_no_event_is_refused_with_file_and_line(tmp_path, change, message):
    good = Event(
        kind=Kind.STEP_BEGUN, at=1.0, wall=1.0, source="a", number=0, job="j", rank=0, epoch=1, step=3
    )
    entry = {**json.loads(good.line()), **change}
    entry = {key: value for key, value in entry.items() if value is not None}
    path = tmp_path / "a.jsonl"
    path.write_text(good.line().decode() + json.dumps(entry) + "\n")
    with pytest.raises(HistoryError, match="line 2: ") as refused:
        read_history([path])
    assert message in str(refused.value)


def test_a_file_that_cannot_be_written_or_read_is_named(tmp_path):
    with pytest.raises(HistoryError, match=r"none/a\.jsonl.*give a file in a folder that exists"):
        HistoryRecorder(tmp_path / "none" / "a.jsonl", "trainer")
    with pytest.raises(HistoryError, match=r"b\.jsonl: No such file"):
        read_history([tmp_path / "b.jsonl"])
