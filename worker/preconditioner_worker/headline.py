"""Published figures beside those measured here, from the committed results alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel

from preconditioner_worker.comparison import Comparison, Row
from preconditioner_worker.demo import Summary
from preconditioner_worker.markdown import Cells, table
from preconditioner_worker.results import ResultError, write_text
from preconditioner_worker.staleness.analysis import Analysis, Part
from preconditioner_worker.staleness.criteria import Verdict
from preconditioner_worker.staleness.report import headline as verdict_on
from preconditioner_worker.staleness.results import read

DEMO, COMPARISON, STALENESS = "demo/summary.json", "comparison.json", "analysis.json"
ARM = "A"
STEPS_GOAL, WALL_GOAL, N_GOAL = 0.51, 0.60, 1200


@dataclass(frozen=True)
class Published:
    """What an article reports; ratios are to the baseline of its own.

    Attributes:
        what: model and optimizer.
        baseline: what it is compared with.
        steps_ratio: None where the article has none.
        wall_ratio: likewise.
        largest_n: of the delay, in steps.
        source: where, and how sure.
    """

    what: str
    baseline: str
    steps_ratio: float | None
    wall_ratio: float | None
    largest_n: int | None
    source: str


PUBLISHED = (
    Published(
        "Transformer, WMT'14 En-Fr, asynchronous Shampoo",
        "a diagonal method",
        1 / 1.95,
        1 / 1.67,
        1200,
        "arXiv 2002.09018; time and N from an article on it, steps from notes on it",
    ),
    Published(
        "Transformer-Big, WMT'14 En-Fr, asynchronous Shampoo",
        "a diagonal method",
        None,
        0.70,
        None,
        "notes on arXiv 2002.09018",
    ),
    Published(
        "DLRM, asynchronous Shampoo",
        "a diagonal method",
        30.97 / 39.96,
        None,
        None,
        "notes on arXiv 2002.09018",
    ),
    Published(
        "BERT-Large, Shampoo",
        "a diagonal method",
        0.84,
        None,
        None,
        "notes on arXiv 2002.09018",
    ),
    Published(
        "ResNet-50 at batch 32K, synchronous Shampoo",
        "a first-order method",
        1729 / 2512,
        None,
        None,
        "the authors' README",
    ),
)


class Results(BaseModel):
    """The committed results that a headline is made of.

    Attributes:
        demo: of ``preconditioner-worker demo``: through a service, at its real age.
        comparisons: of ``preconditioner-worker compare``, by workload.
        studies: of ``preconditioner-worker staleness report``, by folder.
    """

    demo: Summary
    comparisons: dict[str, Comparison]
    studies: dict[str, Analysis]

    @classmethod
    def load(cls, folder: Path) -> Results:
        """Read them from a folder laid out as ``worker/results``.

        Raises:
            ResultError: one is missing or of another kind.
        """
        comparisons = {
            path.parent.name: read(path, Comparison)
            for path in sorted((folder / "compare").glob(f"*/{COMPARISON}"))
        }
        if not comparisons:
            raise ResultError(f"{str(folder / 'compare')!r} holds no comparison of any workload")
        studies = {
            path.parent.name: read(path, Analysis) for path in sorted(folder.glob(f"staleness*/{STALENESS}"))
        }
        if not studies:
            raise ResultError(f"{str(folder)!r} holds no study of staleness")
        return cls(
            demo=read(folder / DEMO, Summary),
            comparisons=comparisons,
            studies=studies,
        )

    @property
    def arms(self) -> list[Arm]:
        """A(N) with the published settings, of every study that ran it."""
        return [
            Arm(folder, study, part)
            for folder, study in self.studies.items()
            for part in study.parts
            if (part.kind, part.statistics, part.grafting) == (ARM, "sum", True)
        ]


class Arm(NamedTuple):
    """An arm and where it was run."""

    folder: str
    study: Analysis
    part: Part

    @property
    def task(self) -> str:
        """Its name and the length of the runs."""
        settings = self.study.fingerprint.settings
        return f"{settings.task}, {settings.steps:,} steps"


def write_headline(folder: Path, output: Path) -> Path:
    """Write the Markdown of the results in ``folder``.

    Raises:
        ResultError: see :meth:`Results.load`.
    """
    return write_text(output, markdown(Results.load(folder)))


def markdown(results: Results) -> str:
    """Published figures, figures from here, the goals, and all optimizers on all workloads."""
    header = ("", "against", "steps ratio", "wall ratio", "largest N that holds", "source")
    rows = [*map(_published, PUBLISHED), *_measured(results)]
    lines = [
        "# What is published, and what came out here",
        "",
        "Ratios are steps and training time until the baseline's final loss is reached, over the baseline's "
        "own; less is better. Models, data and baselines differ, so the rows say what was seen where, and "
        "do not repeat one another. Comparisons ran beside other programs, so that only the demonstration "
        "has a wall ratio. *Holds*: by the criteria of the [studies](staleness/report.md), fixed before "
        "their runs.",
        "",
        *table(header, rows),
        "## Goals",
        "",
        *(f"- {line}" for line in _goals(results)),
        "",
        "## Every optimizer on every workload",
        "",
        "Medians over seeds, least and greatest in brackets; the target is the baseline's final held-out "
        "loss, seed by seed. How they were tuned, on how quiet a machine: [compare](compare/README.md).",
        "",
    ]
    for workload, comparison in results.comparisons.items():
        lines += [f"### {workload}", "", *_comparison(comparison)]
    return "\n".join(lines)


def _published(figure: Published) -> Cells:
    return (
        figure.what,
        figure.baseline,
        _ratio(figure.steps_ratio),
        _ratio(figure.wall_ratio),
        "–" if figure.largest_n is None else str(figure.largest_n),
        figure.source,
    )


def _measured(results: Results) -> Iterator[Cells]:
    demo = results.demo
    yield (
        f"**here**: text, Shampoo through a service, one seed, at most {demo.age_max} steps old",
        "tuned AdamW",
        _ratio(demo.steps_ratio),
        _ratio(demo.wall_ratio),
        "–",
        f"`make demo`, [{DEMO}]({DEMO})",
    )
    for workload, comparison in results.comparisons.items():
        for row in comparison.rows:
            if row.label == "shampoo":
                path = f"compare/{workload}/{COMPARISON}"
                yield (
                    f"**here**: {workload}, Shampoo, {row.seeds} seeds",
                    f"tuned {comparison.baseline}",
                    _ratio(row.steps_ratio),
                    "–",
                    "–",
                    f"`preconditioner-worker compare --workload {workload}`, [{path}]({path})",
                )
    for arm in results.arms:
        largest, path = arm.part.largest_that_holds, f"{arm.folder}/{STALENESS}"
        task = arm.study.fingerprint.settings.task
        yield (
            f"**here**: {arm.task}, A(N) with the published settings",
            "N = 1",
            "–",
            "–",
            "none shown" if largest is None else str(largest),
            f"`preconditioner-worker staleness run --task {task}`, [{path}]({path})",
        )


def _goals(results: Results) -> Iterator[str]:
    demo = results.demo
    for name, goal, measured in (
        ("steps", STEPS_GOAL, demo.steps_ratio),
        ("wall", WALL_GOAL, demo.wall_ratio),
    ):
        if measured is None:
            yield f"{name} ratio at most {goal} on a Transformer: not reached, AdamW's loss was not"
        elif measured <= goal:
            yield f"{name} ratio at most {goal} on a Transformer: **reached**, {measured:.3f} on text"
        else:
            excess = measured - goal
            yield f"{name} ratio at most {goal} on a Transformer: not reached by {excess:.3f}, {measured:.3f}"
    rows = [row for comparison in results.comparisons.values() for row in comparison.rows]
    diverged = sum(row.diverged for row in rows)
    yield (
        "every optimizer trains every workload at its tuned settings without divergence: "
        f"{diverged} of {sum(row.seeds for row in rows)} runs diverged, on {', '.join(results.comparisons)}"
    )
    arms = results.arms
    yield (
        f"N = {N_GOAL} holds in A(N) with the published settings on at least one valid task: "
        f"{_delay_goal(arms)}"
    )
    for arm in arms:
        digits = arm.part.decimals
        yield f"{arm.task}. {verdict_on(arm.part)}"
        for row in arm.part.tested:
            if row.n == N_GOAL and row.verdict is not None and row.difference is not None:
                yield (
                    f"{arm.task}. A({N_GOAL}): {row.verdict.value} ({row.reason}); final loss "
                    f"{row.difference:+.{digits}f} [{row.low:+.{digits}f}, {row.high:+.{digits}f}] against a "
                    f"margin of ±{arm.part.margin:.{digits}f}"
                )
        yield from (f"{arm.task}. {late.describe(arm.part.decimals)}" for late in arm.part.late_starts)


def _delay_goal(arms: Sequence[Arm]) -> str:
    """Whether N holds in the fixed sequence of tests, or by itself, whatever the smaller ones do."""
    if not arms:
        return "not run"
    reached = [arm.task for arm in arms if (arm.part.largest_that_holds or 0) >= N_GOAL]
    if reached:
        return f"**reached** on {'; '.join(reached)}"
    alone = [
        arm.task
        for arm in arms
        if not arm.part.void
        and any(row.n == N_GOAL and row.verdict is Verdict.HOLDS for row in arm.part.tested)
    ]
    if not alone:
        return "not reached"
    return (
        f"it does on {'; '.join(alone)}, where some smaller N before it is not shown to, so that the fixed "
        "sequence of tests does not come to it"
    )


def _comparison(comparison: Comparison) -> list[str]:
    header = ("", "tuned", "final loss", "steps to target", "steps ratio", "diverged")
    return table(header, [_optimizer(row) for row in comparison.rows])


def _optimizer(row: Row) -> Cells:
    deviation = "" if row.final_loss_deviation is None else f" ± {row.final_loss_deviation:.4f}"
    return (
        row.label,
        row.tuned or "not recorded",
        f"{row.final_loss:.4f}{deviation}",
        "never" if row.steps_to_target is None else f"{row.steps_to_target:g}",
        _ratio(row.steps_ratio, row.steps_ratio_range),
        f"{row.diverged} of {row.seeds}",
    )


def _ratio(value: float | None, between: tuple[float, float] | None = None) -> str:
    middle = "–" if value is None else f"{value:.2f}"
    if between is None:
        return middle
    low, high = ("never" if math.isinf(end) else f"{end:.2f}" for end in between)
    return f"{middle} [{low}, {high}]"
