"""The report of a study: Markdown and JSON, from its files alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from preconditioner_worker.markdown import Cells, table
from preconditioner_worker.results import write_text
from preconditioner_worker.staleness.analysis import Analysis, Part, Row, analyse
from preconditioner_worker.staleness.criteria import STEPS_RATIO
from preconditioner_worker.staleness.pictures import NAMES, draw_all
from preconditioner_worker.staleness.real import REAL_FILE, RealComparison
from preconditioner_worker.staleness.results import Study, check_code, read, write
from preconditioner_worker.staleness.tasks import TASKS


def report(folder: Path, output: Path | None = None) -> tuple[Analysis, Path]:
    """Write ``report.md``, ``analysis.json`` and the pictures.

    Args:
        folder: of the study.
        output: where to; None: the same folder.

    Returns:
        The analysis and the path of the Markdown.

    Raises:
        ResultError: the folder holds no study, or runs that do not belong together.
    """
    output = output or folder
    runs = Study(folder).runs()
    analysis = analyse(runs)
    real = read(folder / REAL_FILE, RealComparison) if (folder / REAL_FILE).exists() else None
    if real is not None:
        check_code(real.real, analysis.fingerprint)
    write(output / "analysis.json", analysis)
    pictures = draw_all(analysis, runs, output)
    text = markdown(analysis, [picture.name for picture in pictures], real)
    return analysis, write_text(output / "report.md", text)


def markdown(analysis: Analysis, pictures: Sequence[str], real: RealComparison | None) -> str:
    """The report as text."""
    settings = analysis.fingerprint.settings
    lines = ["# Staleness of preconditioners: what the runs say", ""]
    if analysis.missing:
        lines += [f"**This is a reduced run.** Of the full study it lacks {'; '.join(analysis.missing)}.", ""]
    lines += [
        f"Task: {settings.task}, {TASKS[settings.task].about}. {analysis.parameters} parameters, "
        f"{analysis.blocks} preconditioned blocks. "
        f"{analysis.runs} runs of {settings.steps} steps in virtual time: roots in process, float64, delays "
        f"exact in steps. Measured: {analysis.metric}. Shampoo with the published settings: AdaGrad "
        "grafting, exponent -1/4 per side of a matrix (-1/2 where only one side is preconditioned), "
        f"momentum {settings.momentum} over preconditioned gradients, whose average takes the length of that "
        f"of AdaGrad's directions; blended in over {settings.blend_steps} steps from a block's first version "
        "on, as a gate on the step makes steps of nothing where the first is late. One learning rate per "
        "optimizer, tuned at N = 1 alone; AdamW without weight decay, as Shampoo has none either.",
        "",
        "All differences are paired by seed with N = 1 of the same arm. *Holds*: the 90% interval lies "
        "inside of the margin, min(0.02 nats, 10% of the gap); the median of steps to the target (the "
        f"grafted diagonal's final loss) grows by at most {STEPS_RATIO - 1:.0%}; nothing diverged. These "
        "criteria were fixed in code before the runs. The largest N that holds is the last before the first "
        "that does not, going up (a fixed sequence of tests). *Pairs* are the seeds that a comparison rests "
        "on. *Fresh, but late* has its first preconditioner when "
        "A(N) with the largest N has, and fresh ones from then on: what the late beginning costs alone. "
        "*Drift* is the median of ||P_stale - P_fresh|| / ||P_fresh|| over the second half of training.",
        "",
    ]
    for part in analysis.parts:
        lines += _part(part, settings.steps)
    decimals = max((part.decimals for part in analysis.parts), default=4)
    lines += ["## Without Shampoo", ""]
    lines += table(
        ("optimizer", "seeds", "learning rate", "final loss", "deviation"),
        [
            (
                NAMES[row.method],
                str(row.seeds),
                f"{row.lr:g}",
                _loss(row.final_loss, decimals),
                _loss(row.deviation, decimals),
            )
            for row in analysis.optimizers
        ],
    )
    if real is not None:
        lines += ["## Through the service", "", real.describe(), ""]
    lines += ["## Pictures", "", *(f"![{name.removesuffix('.png')}]({name})" for name in pictures), ""]
    fingerprint = analysis.fingerprint
    made_by = [f"Code {fingerprint.code}", f"torch {fingerprint.torch}", f"NumPy {fingerprint.numpy}"]
    made_by += [f"Python {fingerprint.python}"] if fingerprint.python else []
    made_by += [fingerprint.cpu, *([fingerprint.cpu_model] if fingerprint.cpu_model else [])]
    lines += [f"{', '.join(made_by)}.", ""]
    return "\n".join(lines)


def headline(part: Part) -> str:
    """The verdict on an arm in one sentence."""
    grafting = "with" if part.grafting else "without"
    name = f"{part.kind.value}(N), {part.statistics} statistics, {grafting} grafting"
    if part.void:
        return f"{name}: the task is void: {'; '.join(part.void)}"
    if part.largest_that_holds is None:
        if not part.tested:
            return f"{name}: no N > 1 was run"
        first = part.tested[0]
        verdict = "not judged" if first.verdict is None else first.verdict.value
        return f"{name}: no N > 1 is shown to hold; N = {first.n}, the first in the sequence: {verdict}"
    return f"{name}: the largest N that holds is {part.largest_that_holds}"


def _part(part: Part, steps: int) -> list[str]:
    kind, decimals = part.kind.value, part.decimals
    lines = [f"## {headline(part)}", ""]
    if part.gap is not None:
        lines += [
            f"Gap from the grafted diagonal to {kind}(1): {part.gap:.{decimals}f} "
            f"[{_loss(part.gap_low, decimals)}, {_loss(part.gap_high, decimals)}]; "
            f"margin ±{part.margin:.{decimals}f}. "
            + (
                f"Void: {'; '.join(part.void)}."
                if part.void
                else "The task is valid: both negative controls fail."
            ),
            "",
        ]
    rows = [*part.rows, *part.controls]
    lines += table(
        ("condition", "N/T", "ages", "seeds", "final loss", "pairs", "difference", "90% interval",
         "steps to target", "ratio", "drift", "verdict", ""),
        [_cells(row, kind, steps, decimals) for row in rows],
    )  # fmt: skip
    for late_start in part.late_starts:
        lines += [late_start.describe(decimals), ""]
    return lines


def _cells(row: Row, kind: str, steps: int, decimals: int) -> Cells:
    own = row.method == kind
    compared = row.difference is not None
    return (
        f"{kind}({row.n})" if own else NAMES[row.method],
        f"{(row.n or 0) / steps:.2%}" if own else "",
        ""
        if row.youngest is None
        else f"{row.youngest}–{row.oldest}" + ("" if row.ages_as_planned or not own else " (!)"),
        str(row.seeds) if not row.diverged else f"{row.seeds} ({row.diverged} diverged)",
        _loss(row.final_loss, decimals),
        "" if row.pairs is None else str(row.pairs),
        _signed(row.difference, decimals) if compared else "",
        f"[{_signed(row.low, decimals)}, {_signed(row.high, decimals)}]" if compared else "",
        _count(row.steps_to_target),
        ""
        if row.steps_ratio is None
        else ("never" if math.isinf(row.steps_ratio) else f"{row.steps_ratio:.3f}"),
        "" if row.drift is None else f"{row.drift:.2e}",
        "" if row.verdict is None else f"**{row.verdict.value}**",
        row.reason,
    )


def _loss(value: float | None, decimals: int) -> str:
    return "–" if value is None else f"{value:.{decimals}f}"


def _signed(value: float | None, decimals: int) -> str:
    return "–" if value is None else f"{value:+.{decimals}f}"


def _count(value: float | None) -> str:
    if value is None:
        return ""
    return "never" if math.isinf(value) else f"{value:g}"
