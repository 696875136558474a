"""The demonstration: tuned AdamW against asynchronous Shampoo with a real service, on the text workload.

Both run with settings that were fixed beforehand by the committed tunings, each over the horizon it was tuned
for; nothing is adapted to what happens at run time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from rich.console import Console

from preconditioner_worker.comparison import Comparison, StepTime
from preconditioner_worker.experiments import conclude, horizon, run_all, settle
from preconditioner_worker.results import RunResult, RunSettings, write_text
from preconditioner_worker.workloads import Workload


class Summary(BaseModel):
    """What ``summary.json`` says.

    Attributes:
        target_loss: AdamW's held-out loss at its end.
        steps_adamw: AdamW's first evaluated step at or below the target.
        steps_shampoo: Shampoo's; None if it never got there.
        steps_ratio: of the two.
        wall_ratio: of the seconds of training up to these steps.
        final_loss: of each optimizer, held out.
        versions_adopted: preconditioners taken into use, over all blocks.
        blocks: that are preconditioned.
        age_max: oldest preconditioner ever used, in steps.
        max_staleness: the bound on that age.
        waits: steps that waited for a preconditioner.
        step_ms: milliseconds of a step of each optimizer.
        optimizer_metrics: Shampoo's other counters.
        picture: path of the curves.
    """

    model_config = ConfigDict(extra="forbid")

    target_loss: float
    steps_adamw: int
    steps_shampoo: int | None
    steps_ratio: float | None
    wall_ratio: float | None
    final_loss: dict[str, float]
    versions_adopted: int
    blocks: int
    age_max: int | None
    max_staleness: int
    waits: int
    step_ms: dict[str, StepTime]
    optimizer_metrics: dict[str, Any]
    picture: str


def demonstrate(
    workload: Workload,
    folder: Path,
    console: Console,
    *,
    steps_adamw: int | None = None,
    steps_shampoo: int | None = None,
    evaluate_every: int = 10,
    seed: int = 0,
) -> Summary:
    """Run both, write everything to ``folder`` and return the summary.

    Args:
        workload: the text.
        folder: for ``summary.json``, results and picture.
        console: for progress and the table.
        steps_adamw: horizon of AdamW; None: the one it was tuned for.
        steps_shampoo: horizon of Shampoo; None: the one it was tuned for.
        evaluate_every: steps between evaluations: the resolution of the crossing.
        seed: of weights and batches, for both.
    """
    lengths = {"adamw": steps_adamw, "shampoo": steps_shampoo}
    runs = [
        RunSettings(
            label=name,
            workload=workload.name,
            optimizer=settle(workload.name, name),
            seed=seed,
            steps=horizon(workload.name, name, steps),
            evaluate_every=evaluate_every,
        )
        for name, steps in lengths.items()
    ]
    results = run_all(workload, runs, folder, console)
    comparison, picture = conclude(results, "adamw", folder, console)
    summary = summarise(comparison, results[-1], picture)
    write_text(folder / "summary.json", summary.model_dump_json(indent=1) + "\n")
    return summary


def summarise(comparison: Comparison, shampoo: RunResult, picture: Path) -> Summary:
    """The summary of a comparison of one seed."""
    rows = {label: comparison.row(label) for label in ("adamw", "shampoo")}
    reached = rows["shampoo"].steps_to_target
    metrics = dict(shampoo.metrics)
    metrics.pop("ages", None)  # long, and drawn in the picture
    if shampoo.settings.optimizer.name != "shampoo":
        raise ValueError(f"the challenger is {shampoo.settings.optimizer.name!r}, not 'shampoo'")
    return Summary(
        target_loss=comparison.target_loss,
        steps_adamw=int(rows["adamw"].steps_to_target or 0),
        steps_shampoo=None if reached is None else int(reached),
        steps_ratio=rows["shampoo"].steps_ratio,
        wall_ratio=rows["shampoo"].wall_ratio,
        final_loss={label: row.final_loss for label, row in rows.items()},
        versions_adopted=int(metrics.pop("versions_adopted")),
        blocks=int(metrics.pop("blocks")),
        age_max=metrics.pop("age_max"),
        max_staleness=shampoo.settings.optimizer.max_staleness,
        waits=int(metrics.pop("waits")),
        step_ms={label: row.step_ms for label, row in rows.items()},
        optimizer_metrics=metrics,
        picture=str(picture),
    )
