"""Two training jobs against one service, and random faults; the checker judges what they recorded."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from preconditioner_protos.history import Event, HistoryError, HistoryRecorder, Kind
from preconditioner_worker.faults.cast import Job
from preconditioner_worker.faults.catalogue import CATALOGUE, Stage
from preconditioner_worker.faults.proxy import Proxy
from preconditioner_worker.faults.schedule import Planned, schedule
from preconditioner_worker.faults.service import LocalService, ServiceError
from preconditioner_worker.faults.trainee import Mode
from preconditioner_worker.history import Expectations, Report, examine

JOBS: Sequence[tuple[str, Mode]] = (("eager", "eager"), ("scheduled", "scheduled"))
"""Names and modes of adoption of the jobs."""

RECOVERY_SECONDS = 60.0
"""Within which every job must adopt a version again once all is healed.

Keepalive finds a half-open connection after 30 s at most, and the pause before the next attempt is 5 s."""

FAULTS_A_MINUTE = 10
"""The least for a soak to count as one; on two cores there are about twice as many."""

_OPENING_SECONDS = 30.0
"""Within which a trainer that was just started opens its session: from then on its recovery is timed."""

_SERVICE = "service"
_SERVICE_PATIENCE = 3.0
_QUEUED = 3
"""Faults of one target that may wait behind a slow one, as the start of a process."""


@dataclass(frozen=True, slots=True)
class Result:
    """Of one soak.

    Attributes:
        seed: of the schedule.
        seconds: from the first fault to the last heal.
        faults: how many of each kind were injected.
        steps: of all jobs.
        adopted: versions, of all jobs.
        waits: steps that waited for the service.
        lives: processes of each job.
        roots_computed: again, by the checker.
        looked_at: of every check how many things it held against its rule.
        holes: events that are known to be missing, other than a killed process's last.
        violations: what broke a rule.
        shortfalls: why the absence of violations would prove too little.
        folder: of the histories; None if they were removed: nothing was broken or fell short, and no folder
            was named.
    """

    seed: int
    seconds: float
    faults: dict[str, int]
    steps: int
    adopted: int
    waits: int
    lives: dict[str, int]
    roots_computed: int
    looked_at: dict[str, int]
    holes: int
    violations: list[str] = field(default_factory=list)
    shortfalls: list[str] = field(default_factory=list)
    folder: str | None = None

    def as_json(self) -> dict[str, object]:
        """Plain values."""
        return asdict(self)


def soak(
    minutes: float,
    seed: int,
    *,
    folder: Path | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Result:
    """Run it.

    Args:
        minutes: from the first fault to the last.
        seed: of the schedule.
        folder: for histories and logs, kept whatever happens; None: a temporary one, kept on a violation
            or a shortfall.
        report: told of every fault.

    Raises:
        ServiceError: the service could not be started, or started again; or a trainer ended by itself.
    """
    place = Path(tempfile.mkdtemp(prefix="preconditioner-soak-")) if folder is None else folder
    place.mkdir(parents=True, exist_ok=True)
    faults, jobs, seconds = _torment(minutes, seed, place, report)
    histories = [place / "service.jsonl", place / "faults.jsonl", *(h for job in jobs for h in job.histories)]
    judged = examine(
        [path for path in histories if path.exists()],
        expectations=Expectations(
            matrices=place / "matrices",
            recovery_seconds=RECOVERY_SECONDS,
            killed=frozenset().union(*(job.killed for job in jobs)),
        ),
    )
    lacking = shortfalls(minutes, faults, judged.looked_at)
    kept = place if folder is not None or judged.violations or lacking else None
    if kept is None:
        shutil.rmtree(place)
    return _result(seed, seconds, faults, jobs, judged, lacking, kept)


def shortfalls(minutes: float, faults: Mapping[str, int], looked_at: Mapping[str, int]) -> list[str]:
    """Why the verdict on a soak of so many minutes would prove too little; empty if it does not.

    Args:
        minutes: that were asked for.
        faults: how many of each kind were injected.
        looked_at: see :class:`Result`.
    """
    found = [f"check {check} looked at nothing" for check, count in looked_at.items() if not count]
    if 0 < looked_at["recovery"] < len(JOBS):
        found.append(f"check recovery looked at {looked_at['recovery']} of {len(JOBS)} jobs")
    if (injected := sum(faults.values())) < FAULTS_A_MINUTE * minutes:
        found.append(f"{injected} faults in {minutes:g} minutes; at least {FAULTS_A_MINUTE} a minute are due")
    return found


def _torment(
    minutes: float, seed: int, place: Path, report: Callable[[str], None]
) -> tuple[Counter[str], list[Job], float]:
    with ExitStack() as stack:
        recorder = HistoryRecorder(place / "faults.jsonl", "harness")
        stack.callback(recorder.close)
        service = LocalService(
            arguments=(
                "--history-file", str(place / "service.jsonl"),
                "--history-matrices", str(place / "matrices"),
                # A batch that a frozen actor holds is given up soon.
                "--batch-patience", str(_SERVICE_PATIENCE),
            ),
            log=place / "service.log",
        )  # fmt: skip
        stack.enter_context(service)
        jobs = []
        for number, (name, mode) in enumerate(JOBS):
            link = stack.enter_context(Proxy(service.address, seed=seed + number))
            job = Job(name, mode, link, place, service.token, seed + number)
            stack.callback(job.stop)
            job.start()
            jobs.append(job)
        _until_all_adopt(jobs, 60.0)
        began = time.monotonic()
        counts = _inject(began + 60.0 * minutes, seed, service, jobs, recorder, report)
        seconds = time.monotonic() - began
        report("all is healed; versions must arrive again")
        # Longer than is allowed, so that the checker sees it exceeded.
        _until_all_adopt(jobs, RECOVERY_SECONDS + _OPENING_SECONDS)
        # The service first, so that it drains under load.
        service.stop()
        for job in jobs:
            job.stop()
        return counts, jobs, seconds


def _inject(
    until: float,
    seed: int,
    service: LocalService,
    jobs: Sequence[Job],
    recorder: HistoryRecorder,
    report: Callable[[str], None],
) -> Counter[str]:
    """Faults of the service and of each job overlap; those of one target come one after the other."""
    by_name = {job.name: job for job in jobs}
    counts: Counter[str] = Counter()
    with ExitStack() as stack:
        threads = {name: stack.enter_context(ThreadPoolExecutor(1)) for name in (_SERVICE, *by_name)}
        queued: dict[str, list[Future[None]]] = {name: [] for name in threads}
        for planned in schedule(seed, list(by_name)):
            target = planned.job if CATALOGUE[planned.name].about != "service" else _SERVICE
            time.sleep(planned.pause)
            if len(queued[target]) >= _QUEUED:
                queued[target].pop(0).result()
            if time.monotonic() >= until:
                break
            stage = Stage(service, by_name[planned.job], planned.draw)

            def play(planned: Planned = planned, target: str = target, stage: Stage = stage) -> None:
                if time.monotonic() >= until:
                    return
                counts[planned.name] += 1
                report(f"{counts.total():4d}  {planned.name} ({target}, {planned.hold:.1f} s)")
                _play(planned, target, stage, recorder)

            queued[target].append(threads[target].submit(play))
        for playing in itertools.chain(*queued.values()):
            playing.result()
    return counts


def _play(planned: Planned, target: str, stage: Stage, recorder: HistoryRecorder) -> None:
    fault, job = CATALOGUE[planned.name], stage.job
    if target == job.name:
        # A zombie has had its chance since the fault before.
        job.end_zombies()
        _check_alive(job)
    about: dict[str, Any] = {
        "fault": planned.name,
        "target": target,
        "stops": job.name if fault.stops else None,
    }
    recorder.record(Kind.FAULT_INJECTED, **about)
    fault.inject(stage)
    time.sleep(planned.hold)
    fault.heal(stage)
    recorder.record(Kind.FAULT_HEALED, **about)


def _until_all_adopt(jobs: Sequence[Job], seconds: float) -> None:
    """Wait until every job has adopted once more; the checker judges if it does not."""
    begin = time.monotonic()
    sizes = {job.name: _size(job.histories[-1]) for job in jobs}
    waiting = list(jobs)
    while waiting and time.monotonic() < begin + seconds:
        time.sleep(0.2)
        for job in waiting:
            _check_alive(job)
        waiting = [job for job in waiting if not adopted_since(job.histories[-1], begin, sizes[job.name])]
    # So that the last of them is seen to go on.
    time.sleep(0.5)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _check_alive(job: Job) -> None:
    if not job.alive():
        raise ServiceError(f"job {job.name} ended by itself; see {job.folder / f'{job.name}.log'}")


def adopted_since(path: Path, begin: float, offset: int = 0) -> bool:
    """Whether a history says from ``offset`` on that a version was adopted at ``begin`` or later.

    Lines are written after what they tell, on a busy machine long after: their times count.
    """
    if not path.exists():
        return False
    with path.open("rb") as file:
        file.seek(offset)
        lines = file.read().split(b"\n")
    for line in lines:
        # The first and the last may be parts of lines.
        with contextlib.suppress(HistoryError):
            if Kind.ADOPTED.value.encode() in line and Event.parse(line).at >= begin:
                return True
    return False


def _result(
    seed: int,
    seconds: float,
    faults: Counter[str],
    jobs: Sequence[Job],
    judged: Report,
    lacking: list[str],
    kept: Path | None,
) -> Result:
    kinds = Counter(event.kind for event in judged.history.events)
    return Result(
        seed=seed,
        seconds=round(seconds, 1),
        faults={name: faults[name] for name in CATALOGUE},
        steps=kinds[Kind.STEP_ENDED],
        adopted=kinds[Kind.ADOPTED],
        waits=kinds[Kind.WAIT_BEGUN],
        lives={job.name: job.lives for job in jobs},
        roots_computed=judged.looked_at["roots"],
        looked_at=judged.looked_at,
        holes=judged.history.holes,
        violations=[str(violation) for violation in judged.violations],
        shortfalls=lacking,
        folder=None if kept is None else str(kept),
    )


def table(result: Result) -> Table:
    """Counts of each fault, and the verdict below."""
    shown = Table(title=f"soak, seed {result.seed}", title_justify="left")
    shown.add_column("fault")
    shown.add_column("injected", justify="right")
    for name, count in result.faults.items():
        shown.add_row(name, str(count))
    shown.add_section()
    shown.add_row("all", str(sum(result.faults.values())))
    return shown
