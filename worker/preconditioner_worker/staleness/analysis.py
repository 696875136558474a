"""From the runs of a study to its verdicts."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import fmean, median, stdev

from preconditioner_worker.results import ResultError
from preconditioner_worker.staleness.arms import PUBLISHED_N, ArmKind
from preconditioner_worker.staleness.criteria import Judgement, Verdict, interval, judge, margin, validity
from preconditioner_worker.staleness.fingerprint import Fingerprint
from preconditioner_worker.staleness.results import StudyRun
from preconditioner_worker.staleness.specs import CONTROLS, Method, Record, Statistics

FULL_SEEDS = 5
NEGATIVE: tuple[Method, ...] = ("frozen", "random")

Seeds = dict[int, StudyRun]


class Row(Record):
    """All seeds of one condition.

    Attributes:
        condition: see :attr:`RunSpec.condition`.
        method: an arm, a control or another optimizer.
        n: N or D in steps, where the method has one.
        seeds: how many runs.
        diverged: how many of them diverged.
        lr: peak learning rate.
        final_loss: mean over the seeds; infinite if one diverged.
        deviation: standard deviation over the seeds; None for one.
        difference: mean of the paired differences to N = 1; None where nothing is compared.
        low: of its 90% interval.
        high: of its 90% interval.
        steps_to_target: median; infinite where most seeds never arrived.
        steps_ratio: median of the paired ratios to N = 1.
        youngest: least age in use, None without preconditioners.
        oldest: greatest age in use.
        ages_as_planned: every step of every run had the age of the arm's arithmetic.
        drift: median over the probes of the second half of training, of the median over blocks.
        verdict: None where nothing is tested.
        reason: of the verdict.
    """

    condition: str
    method: Method
    n: int | None
    seeds: int
    diverged: int
    lr: float
    final_loss: float
    deviation: float | None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    steps_to_target: float | None = None
    steps_ratio: float | None = None
    youngest: int | None = None
    oldest: int | None = None
    ages_as_planned: bool | None = None
    drift: float | None = None
    verdict: Verdict | None = None
    reason: str = ""


class Part(Record):
    """One arm with one kind of statistics, with or without grafting.

    Attributes:
        kind: P, L or A.
        statistics: sum or ema.
        grafting: on or off.
        gap: mean over seeds of the grafted diagonal's final loss minus that of N = 1; None without runs.
        gap_low: of its 90% interval.
        gap_high: of its 90% interval.
        margin: of equivalence, in the loss's unit.
        void: why the task says nothing here; empty if it is valid.
        rows: of the arm, by N.
        controls: the negative controls and the late start, put to the same test.
    """

    kind: ArmKind
    statistics: Statistics
    grafting: bool
    gap: float | None
    gap_low: float | None
    gap_high: float | None
    margin: float
    void: tuple[str, ...]
    rows: tuple[Row, ...]
    controls: tuple[Row, ...]

    @property
    def largest_that_holds(self) -> int | None:
        """The largest N with a verdict of 'holds'; None if there is none, or the task is void."""
        holding = [row.n for row in self.rows if row.verdict is Verdict.HOLDS and row.n is not None]
        return max(holding, default=None) if not self.void else None


class Analysis(Record):
    """All that a report says.

    Attributes:
        fingerprint: of all runs.
        metric: what losses measure, with its unit.
        runs: how many.
        parameters: of the model.
        blocks: that are preconditioned.
        missing: what the full study has and this one has not.
        parts: the arms.
        optimizers: the grafted diagonal and the other optimizers.
    """

    fingerprint: Fingerprint
    metric: str
    runs: int
    parameters: int
    blocks: int
    missing: tuple[str, ...]
    parts: tuple[Part, ...]
    optimizers: tuple[Row, ...]


def analyse(runs: Sequence[StudyRun]) -> Analysis:
    """Judge every condition that ``runs`` hold.

    Args:
        runs: of one study.

    Raises:
        ResultError: an arm has no runs with N = 1.
    """
    groups: dict[str, Seeds] = defaultdict(dict)
    for run in runs:
        groups[run.spec.condition][run.spec.seed] = run
    diagonal = next((seeds for seeds in groups.values() if _any(seeds).spec.method == "diagonal"), {})
    arms: dict[tuple[ArmKind, Statistics, bool], list[Seeds]] = defaultdict(list)
    for seeds in groups.values():
        spec = _any(seeds).spec
        if spec.arm is not None and spec.statistics is not None and spec.grafting is not None:
            arms[spec.arm.kind, spec.statistics, spec.grafting].append(seeds)
    return Analysis(
        fingerprint=runs[0].fingerprint,
        metric=runs[0].metric,
        runs=len(runs),
        parameters=runs[0].parameters,
        blocks=max(run.blocks for run in runs),
        missing=tuple(missing(runs)),
        parts=tuple(
            _part(*key, members, list(groups.values()), diagonal) for key, members in sorted(arms.items())
        ),
        optimizers=tuple(
            _row(seeds, diagonal)
            for seeds in groups.values()
            if _any(seeds).spec.method in ("diagonal", "adamw", "adagrad")
        ),
    )


def missing(runs: Iterable[StudyRun]) -> list[str]:
    """What the full study has and ``runs`` have not, in words."""
    specs = [run.spec for run in runs]
    found = []
    for kind in ArmKind:
        of_kind = [spec for spec in specs if spec.method == kind.value]
        if not of_kind:
            found.append(f"the arm {kind.value}(N)")
            continue
        absent = [str(n) for n in PUBLISHED_N if n not in {spec.n for spec in of_kind}]
        if absent:
            found.append(f"{kind.value}(N) with N = {', '.join(absent)}")
    shampoo = [spec for spec in specs if spec.arm is not None]
    for statistics in ("sum", "ema"):
        if not any(spec.statistics == statistics for spec in shampoo):
            found.append(f"statistics as {'a sum' if statistics == 'sum' else 'an EMA'}")
    for grafting in (True, False):
        if not any(spec.grafting is grafting for spec in shampoo):
            found.append(f"Shampoo {'with' if grafting else 'without'} grafting")
    for method in CONTROLS:
        if not any(spec.method == method for spec in specs):
            found.append(f"the control {method!r}")
    seeds = len({spec.seed for spec in specs})
    if seeds < FULL_SEEDS:
        found.append(f"{FULL_SEEDS - seeds} of {FULL_SEEDS} seeds")
    return found


def _any(seeds: Seeds) -> StudyRun:
    return next(iter(seeds.values()))


def _part(
    kind: ArmKind,
    statistics: Statistics,
    grafting: bool,
    members: Sequence[Seeds],
    groups: Sequence[Seeds],
    diagonal: Seeds,
) -> Part:
    reference = next((seeds for seeds in members if _any(seeds).spec.n == 1), None)
    if reference is None:
        raise ResultError(f"{kind.value}(N) has no run with N = 1, with which the others are compared")
    gaps = [diagonal[seed].final_loss - run.final_loss for seed, run in reference.items() if seed in diagonal]
    gap = interval(gaps) if gaps else None
    half_width = margin(gap.mean) if gap is not None and math.isfinite(gap.mean) else 0.0
    rows = [
        _row(seeds, diagonal, reference=reference, half_width=half_width)
        for seeds in sorted(members, key=lambda seeds: _any(seeds).spec.n or 0)
    ]
    controls = [
        _row(seeds, diagonal, reference=reference, half_width=half_width)
        for seeds in groups
        if (spec := _any(seeds).spec).method in (*NEGATIVE, "late")
        and (spec.statistics, spec.grafting) == (statistics, grafting)
    ]
    verdicts = [
        (name, next((row.verdict for row in controls if row.method == name), None)) for name in NEGATIVE
    ]
    return Part(
        kind=kind,
        statistics=statistics,
        grafting=grafting,
        gap=None if gap is None else gap.mean,
        gap_low=None if gap is None else gap.low,
        gap_high=None if gap is None else gap.high,
        margin=half_width,
        void=tuple(validity(gaps, verdicts)),
        rows=tuple(rows),
        controls=tuple(controls),
    )


def _row(seeds: Seeds, diagonal: Seeds, *, reference: Seeds | None = None, half_width: float = 0.0) -> Row:
    runs = [seeds[seed] for seed in sorted(seeds)]
    first = runs[0]
    losses = [run.final_loss for run in runs]
    finite = all(map(math.isfinite, losses))
    ages = [age for run in runs for age in run.ages]
    late = [d.median for run in runs for d in run.drift if 2 * d.step > run.steps]
    judgement = (
        None if reference is None or seeds is reference else _judged(seeds, diagonal, reference, half_width)
    )
    to_target = [
        run.steps_to(diagonal[run.spec.seed].final_loss) for run in runs if run.spec.seed in diagonal
    ]
    return Row(
        condition=first.spec.condition,
        method=first.spec.method,
        n=first.spec.n,
        seeds=len(runs),
        diverged=sum(run.diverged for run in runs),
        lr=first.lr,
        final_loss=fmean(losses) if finite else math.inf,
        deviation=stdev(losses) if finite and len(runs) > 1 else None,
        difference=None if judgement is None else judgement.difference.mean,
        low=None if judgement is None else judgement.difference.low,
        high=None if judgement is None else judgement.difference.high,
        steps_to_target=median(to_target) if to_target else None,
        steps_ratio=None if judgement is None else judgement.steps_ratio,
        youngest=min(ages, default=None),
        oldest=max(ages, default=None),
        ages_as_planned=all(run.ages_as_planned for run in runs) if first.spec.arm is not None else None,
        drift=median(late) if late else None,
        verdict=None if judgement is None else judgement.verdict,
        reason="" if judgement is None else judgement.reason,
    )


def _judged(seeds: Seeds, diagonal: Seeds, reference: Seeds, half_width: float) -> Judgement | None:
    paired = [seed for seed in sorted(seeds) if seed in reference and seed in diagonal]
    if not paired:
        return None
    targets = {seed: diagonal[seed].final_loss for seed in paired}
    return judge(
        [seeds[seed].final_loss for seed in paired],
        [reference[seed].final_loss for seed in paired],
        [seeds[seed].steps_to(targets[seed]) for seed in paired],
        [reference[seed].steps_to(targets[seed]) for seed in paired],
        half_width,
    )
