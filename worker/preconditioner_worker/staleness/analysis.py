"""From the runs of a study to its verdicts."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import takewhile
from statistics import fmean, median

import numpy as np

from preconditioner_worker.results import ResultError
from preconditioner_worker.staleness.arms import ArmKind
from preconditioner_worker.staleness.completeness import missing
from preconditioner_worker.staleness.criteria import Judgement, Verdict, interval, judge, margin, validity
from preconditioner_worker.staleness.fingerprint import Fingerprint
from preconditioner_worker.staleness.results import StudyRun
from preconditioner_worker.staleness.specs import Method, Record, Statistics

NEGATIVE: tuple[Method, ...] = ("frozen", "random")

Seeds = dict[int, StudyRun]


class Row(Record):
    """All seeds of one condition.

    Attributes:
        condition: see :attr:`RunSpec.condition`.
        method: an arm, a control or another optimizer.
        n: N or D in steps, where the method has one.
        seeds: how many runs.
        pairs: how many of them are paired with N = 1, which the comparison rests on; None without one.
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
    pairs: int | None = None
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


class LateStart(Record):
    """A(N) beside fresh preconditioners that begin at the same step, on the seeds that both have.

    Attributes:
        n: N.
        seeds: that both have.
        verdict: of A(N) on these seeds.
        reason: of that verdict.
        late_verdict: of the fresh ones.
        late_reason: of that verdict.
        against_late: verdict of A(N) with the fresh ones in place of N = 1. What differs then is the age of
            preconditioners alone; this was not among the criteria when the first studies were made, and is
            none of those by which a delay holds.
        against_late_reason: of that verdict.
        difference: of final losses, A(N) minus the fresh ones, paired, mean.
        low: of its 90% interval.
        high: of its 90% interval.
        steps_ratio: of steps to the target, A(N) to the fresh ones; as in :class:`Judgement`.
    """

    n: int
    seeds: tuple[int, ...]
    verdict: Verdict
    reason: str
    late_verdict: Verdict
    late_reason: str
    against_late: Verdict
    against_late_reason: str
    difference: float
    low: float
    high: float
    steps_ratio: float | None

    def describe(self, decimals: int) -> str:
        """In words, with what follows from it.

        Args:
            decimals: of losses.
        """
        text = (
            f"On the seeds that both have ({', '.join(map(str, self.seeds))}), A({self.n}): "
            f"{self.verdict.value} ({self.reason}); fresh preconditioners that begin at the same step, "
            f"{2 * self.n}: {self.late_verdict.value} ({self.late_reason})."
        )
        if self.verdict is self.late_verdict is Verdict.FAILS:
            text += (
                f" The late beginning alone is enough to fail: that A({self.n}) does is no evidence against "
                "stale preconditioners."
            )
        ratio = self.steps_ratio
        steps = "" if ratio is None else f"{ratio:.3f}" if math.isfinite(ratio) else "never"
        return (
            f"{text} Age alone, A({self.n}) against these fresh ones by the same criteria: "
            f"{self.against_late.value} ({self.against_late_reason}), final loss "
            f"{self.difference:+.{decimals}f} [{self.low:+.{decimals}f}, {self.high:+.{decimals}f}]"
            f"{steps and f', steps to the target {steps}'}."
        )


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
        late_starts: what A(N) owes to its late beginning, for every N that has such a control.
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
    late_starts: tuple[LateStart, ...] = ()

    @property
    def tested(self) -> tuple[Row, ...]:
        """The rows of the arm but N = 1, by N."""
        return tuple(row for row in self.rows if row.n != 1)

    @property
    def decimals(self) -> int:
        """Of losses in a report: four, or as many as show two digits of the margin."""
        return max(4, 1 - math.floor(math.log10(self.margin))) if self.margin > 0 else 4

    @property
    def largest_that_holds(self) -> int | None:
        """The last N that holds before the first that does not; None without one, or if the task is void."""
        holding = list(takewhile(lambda row: row.verdict is Verdict.HOLDS, self.tested))
        return holding[-1].n if holding and not self.void else None


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
        late_starts=tuple(
            found
            for seeds in groups
            if (spec := _any(seeds).spec).method == "late"
            and (spec.statistics, spec.grafting) == (statistics, grafting)
            and (found := _late_start(kind, seeds, members, diagonal, reference, half_width)) is not None
        ),
    )


def _late_start(
    kind: ArmKind,
    late: Seeds,
    members: Sequence[Seeds],
    diagonal: Seeds,
    reference: Seeds,
    half_width: float,
) -> LateStart | None:
    n = _any(late).spec.n
    own = next((seeds for seeds in members if _any(seeds).spec.n == n), {})
    # The control begins where A(N) does; the other arms begin earlier.
    if kind is not ArmKind.PUBLISHED or n is None:
        return None
    shared = sorted(own.keys() & late.keys() & reference.keys() & diagonal.keys())
    judged = _judged({seed: own[seed] for seed in shared}, diagonal, reference, half_width)
    judged_late = _judged({seed: late[seed] for seed in shared}, diagonal, reference, half_width)
    against = _judged({seed: own[seed] for seed in shared}, diagonal, late, half_width)
    if judged is None or judged_late is None or against is None:
        return None
    return LateStart(
        n=n,
        seeds=tuple(shared),
        verdict=judged.verdict,
        reason=judged.reason,
        late_verdict=judged_late.verdict,
        late_reason=judged_late.reason,
        against_late=against.verdict,
        against_late_reason=against.reason,
        difference=against.difference.mean,
        low=against.difference.low,
        high=against.difference.high,
        steps_ratio=against.steps_ratio,
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
        run.steps_to(target.final_loss)
        for run in runs
        if (target := diagonal.get(run.spec.seed)) is not None and not target.diverged
    ]
    return Row(
        condition=first.spec.condition,
        method=first.spec.method,
        n=first.spec.n,
        seeds=len(runs),
        diverged=sum(run.diverged for run in runs),
        lr=first.lr,
        final_loss=fmean(losses) if finite else math.inf,
        deviation=float(np.std(losses, ddof=1)) if finite and len(runs) > 1 else None,
        pairs=None if judgement is None else judgement.seeds,
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
