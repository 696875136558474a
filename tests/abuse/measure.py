"""One attack on a running service, judged: statuses, memory, and how another job fares meanwhile."""

from __future__ import annotations

import json
import os
import statistics as numbers
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from cases import Case

from raw_trainer import RawTrainer, manifest, open_request, statistics
from service_process import TOKEN, ServiceProcess, wait_for

MIB = 2**20
BUDGET = 256 * MIB
ALLOWANCE = 200 * MIB
SLOWDOWN = 2.0

SETTINGS = (
    f"--max-total-bytes={BUDGET}",
    f"--max-job-bytes={BUDGET // 2}",
    # Shorter than by default, so that their ends are seen while the attack lasts.
    "--session-ttl=2",
    "--handshake-timeout=1",
    "--answer-timeout=1",
)


class HonestJob:
    """A trainer that refreshes a block of (512, 512) and waits for it, again and again.

    One block keeps one of the two workers busy: its fair share beside another job that floods.
    """

    def __init__(self, service: ServiceProcess, job: str = "honest") -> None:
        self._trainer = RawTrainer(service.address, TOKEN, **{"grpc.use_local_subchannel_pool": 1})
        self._trainer.open(open_request(job, manifest((512, 512))))
        self._stream = self._trainer.attach()
        self._matrix = statistics(512)
        self._step = 0

    def refresh(self) -> float:
        """Seconds from the snapshot to its preconditioner."""
        self._step += 1
        began = time.monotonic()
        self._stream.snapshot(0, self._step, self._matrix, self._matrix)
        self._stream.until(lambda: self._stream.arrived and self._stream.arrived[-1].step == self._step)
        return time.monotonic() - began

    def refreshes(self, seconds: float, attackers: Sequence[subprocess.Popen[str]] = ()) -> list[float]:
        """One after the other for a time, and until these processes end; three at least."""
        until = time.monotonic() + seconds
        taken: list[float] = []
        while (
            len(taken) < 3
            or time.monotonic() < until
            or any(attacker.poll() is None for attacker in attackers)
        ):
            taken.append(self.refresh())
        return taken

    def close(self) -> None:
        self._stream.half_close()
        self._trainer.close()
        self._trainer.channel.close()


class Memory:
    """The peak of a process's resident memory while this lasts, by its high-water mark and by samples."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._mark = Path(f"/proc/{pid}/clear_refs")
        self._done = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self.before = self.peak = 0

    def __enter__(self) -> Memory:
        self.before = self.peak = self._process.memory_info().rss
        self._mark.write_text("5")  # the mark begins anew
        self._sampler.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._sampler.join()
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        marked = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        self.peak = max(self.peak, int(marked.split()[1]) * 1024)

    def _sample(self) -> None:
        while not self._done.wait(0.02):
            self.peak = max(self.peak, self._process.memory_info().rss)


@dataclass
class Outcome:
    """What was measured of one case; seconds are medians.

    Attributes:
        saw: statuses and other ends, and how often.
        rss_before, rss_peak: of the service's process, bytes.
        alone, attacked: of the honest job's refreshes before and during the attack, seconds.
        samples: refreshes during the attack.
        fair_share: of its refreshes alone, while a program that asks nothing of the service takes the other
            half of two processors, seconds; 0: not measured.
        faults: why the verdict is no; empty if it is yes.
    """

    case: Case
    saw: dict[str, int]
    rss_before: int
    rss_peak: int
    alone: float
    attacked: float
    samples: int
    faults: list[str]
    fair_share: float = 0.0

    @property
    def slowdown(self) -> float:
        return self.attacked / self.alone

    @property
    def slowdown_of_share(self) -> float:
        return self.attacked / self.fair_share


def measure(
    service: ServiceProcess,
    honest: HonestJob,
    cases: Sequence[Case],
    seconds: float,
    scale: Mapping[Case, float] | None = None,
    fair_share: bool = False,
) -> list[Outcome]:
    """Attack the service in these ways at once; raise nothing that a verdict can say.

    Args:
        service: running with :data:`SETTINGS`.
        honest: the other job.
        cases: one after the other gives each its own figures.
        seconds: of the attack.
        scale: parts of the cases' full sizes.
        fair_share: measure what the honest job has left of a machine that somebody else half fills, too.
            Verdicts of cases with ``shares`` take it into account.
    """
    assert service.process is not None
    honest.refresh()
    # Before and after, since a shared machine is not equally busy all the time.
    alone = honest.refreshes(seconds / 2)
    with Memory(service.process.pid) as memory:
        attackers = [
            _attacker(service, case, seconds, max(1, round(case.size * (scale or {}).get(case, 1.0))))
            for case in cases
        ]
        for attacker in attackers:
            assert attacker.stdout is not None
            assert attacker.stdout.readline() == "begun\n"
        during = honest.refreshes(seconds, attackers)
        seen = [json.loads(attacker.stdout.read() or "{}") for attacker in attackers if attacker.stdout]
    after = _serves_after(service)
    alone += honest.refreshes(seconds / 2)
    medians = numbers.median(alone), numbers.median(during)
    share = _at_fair_share(honest, seconds) if fair_share else 0.0
    return [
        judged(
            Outcome(case, saw, memory.before, memory.peak, *medians, len(during), [*after], share),
            service.log,
        )
        for case, saw in zip(cases, seen, strict=True)
    ]


def _at_fair_share(honest: HonestJob, seconds: float) -> float:
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        return numbers.median(honest.refreshes(seconds))
    finally:
        busy.kill()
        busy.wait()


def _attacker(service: ServiceProcess, case: Case, seconds: float, size: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            sys.executable, str(Path(__file__).with_name("attacker.py")), case.attack.__name__,
            service.address, TOKEN, str(seconds), str(size), *case.expected,
        ],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "helpers")},
        stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def judged(outcome: Outcome, log: str) -> Outcome:
    """The outcome with its faults, of which ``log`` of the service may show one."""
    case, faults = outcome.case, outcome.faults
    if missing := [name for name in case.expected if not outcome.saw.get(name)]:
        faults.append(f"not seen: {', '.join(missing)}")
    if others := outcome.saw.keys() - case.expected - case.also:
        faults.append(f"unexpected: {', '.join(sorted(others))}")
    if outcome.rss_peak > BUDGET + ALLOWANCE:
        faults.append(f"{outcome.rss_peak // MIB} MiB resident")
    if outcome.slowdown > SLOWDOWN:
        faults.append(f"the other job is {outcome.slowdown:.2f} times slower")
    if case.shares and outcome.fair_share and outcome.slowdown_of_share > SLOWDOWN:
        faults.append(f"the other job is {outcome.slowdown_of_share:.2f} times slower than at its fair share")
    if "Traceback" in log:
        faults.append("a traceback in the log")
    return outcome


def _serves_after(service: ServiceProcess) -> list[str]:
    """Another trainer comes anew and is served, once what the attacker left has expired."""

    def served() -> bool:
        try:
            late = HonestJob(service, "late")
        except Exception:
            return False
        late.refresh()
        late.close()
        return True

    try:
        wait_for(served, 20.0)
    except AssertionError:
        return ["a new trainer is not served afterwards"]
    return []
