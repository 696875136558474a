"""The grids behind the committed tunings.

Every contender has five learning rates on every workload that is compared, a run's length each. The rest
stays at the defaults of its settings, which are not always those of its paper: Adam and AdamW have beta2
0.99. AdamW and Shampoo on text, which the demonstration shows, have more stages, twelve trials each; a
comparison says of every row how many it had.
"""

from __future__ import annotations

from collections.abc import Mapping

from preconditioner_worker.optimizers import AdamWSettings, ShampooSettings
from preconditioner_worker.tuning import Grid
from preconditioner_worker.workloads import DEFAULT_STEPS

VIRTUAL = "local:10"
"""Exact virtual steps, about as late as a service beside the training process: it repeats bit for bit."""

_GRIDS: Mapping[tuple[str, str], Grid] = {
    ("text", "adamw"): Grid(
        workload="text",
        start=AdamWSettings(lr=3e-3, beta2=0.99, weight_decay=0.1),
        steps=1500,
        stages=[
            {"lr": [1.5e-3, 2e-3, 3e-3, 4e-3, 6e-3]},
            {"weight_decay": [0.03, 0.3]},
            {"beta2": [0.95, 0.999]},
            {"beta1": [0.95]},
            {"lr": [2.5e-3, 3.5e-3]},
        ],
    ),
    ("text", "shampoo"): Grid(
        workload="text",
        start=ShampooSettings(
            lr=4e-3,
            grafting_beta2=0.99,
            statistics_beta=0.99,
            weight_decay=0.1,
            service=VIRTUAL,
        ),
        steps=750,
        stages=[
            {"exponent": [None, 0.5]},
            {"lr": [3e-3, 6e-3, 8e-3]},
            {"statistics_beta": [0.95, 0.998]},
            {"grafting_beta2": [0.95]},
            {"weight_decay": [0.3]},
            {"ridge_value": [1e-4]},
            {"lr": [4e-3, 5e-3]},
        ],
    ),
}

RATES: Mapping[str, list[float]] = {
    "adamw": [5e-4, 1.5e-3, 3e-3, 6e-3, 2e-2],
    "adam": [5e-4, 1.5e-3, 3e-3, 6e-3, 2e-2],
    "adagrad": [3e-3, 1e-2, 3e-2, 6e-2, 0.2],
    "sgd": [3e-3, 1e-2, 3e-2, 0.1, 0.3],
    "lars": [1.0, 3.0, 10.0, 20.0, 50.0],
    "lamb": [3e-3, 1e-2, 2e-2, 5e-2, 0.1],
    "curveball": [0.1, 0.3, 0.5, 0.7, 1.0],
    "shampoo": [5e-4, 1.5e-3, 3e-3, 6e-3, 2e-2],
    "shampoo-2020": [3e-3, 1e-2, 3e-2, 6e-2, 0.2],
    "kfac": [1e-3, 3e-3, 1e-2, 3e-2, 0.1],
    "shampoo-sync": [5e-4, 1.5e-3, 3e-3, 6e-3, 2e-2],
    "adamw-attached": [5e-4, 1.5e-3, 3e-3, 6e-3, 2e-2],
    "sgd-attached": [3e-3, 1e-2, 3e-2, 0.1, 0.3],
}
SHORTER: Mapping[tuple[str, str], int] = {("text", "curveball"): 300}
"""Shorter than the workload's: a step of CurveBall costs five of AdamW's there, so its runs take as long."""
COMPARED = ("digits-batchnorm", "autoencoder", "translation", "text")
BLEND_SHARE = 0.05
"""Of a run, in which Shampoo as of 2020 passes from the diagonal; 1000 steps are more than most runs have."""


def _rates(workload: str, optimizer: str) -> Grid:
    steps = SHORTER.get((workload, optimizer), DEFAULT_STEPS[workload])
    start: dict[str, object] = {"name": optimizer}
    if optimizer in ("adamw", "adamw-attached"):
        start["weight_decay"] = 0.01  # without any it were Adam
    if optimizer in ("shampoo", "kfac", "adamw-attached", "sgd-attached"):
        start["service"] = VIRTUAL
    if optimizer == "shampoo-2020":
        start |= {"service": VIRTUAL, "blend_steps": round(BLEND_SHARE * steps)}
    return Grid.model_validate(
        {"workload": workload, "start": start, "steps": steps, "stages": [{"lr": RATES[optimizer]}]}
    )


GRIDS: Mapping[tuple[str, str], Grid] = {
    **{(workload, optimizer): _rates(workload, optimizer) for workload in COMPARED for optimizer in RATES},
    **_GRIDS,
}
