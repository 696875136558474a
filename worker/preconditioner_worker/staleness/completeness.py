"""What a study lacks of the full one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from preconditioner_worker.staleness.arms import PUBLISHED_N, ArmKind
from preconditioner_worker.staleness.results import StudyRun
from preconditioner_worker.staleness.specs import CONTROLS

FULL_SEEDS = 5
FULL_STEPS = 12_000
"""Least length of a run: N = 1200 is a tenth of it."""


def missing(runs: Iterable[StudyRun]) -> list[str]:
    """What the full study has and ``runs`` have not, in words."""
    runs = list(runs)
    specs = [run.spec for run in runs]
    found = []
    steps = min((run.fingerprint.settings.steps for run in runs), default=0)
    if steps < FULL_STEPS:
        found.append(f"{FULL_STEPS - steps} of the {FULL_STEPS} steps of a run")
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
    seeds = {spec.seed for spec in specs}
    if len(seeds) < FULL_SEEDS:
        found.append(f"{FULL_SEEDS - len(seeds)} of {FULL_SEEDS} seeds")
    of_condition: dict[str, set[int]] = defaultdict(set)
    for spec in specs:
        of_condition[spec.condition].add(spec.seed)
    for condition, own in of_condition.items():
        if lacking := sorted(seeds - own):
            found.append(f"the seed {', '.join(map(str, lacking))} of {condition}")
    return found
