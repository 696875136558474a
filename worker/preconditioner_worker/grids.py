"""The grids behind the committed tunings."""

from __future__ import annotations

from collections.abc import Mapping

from preconditioner_worker.optimizers import AdamWSettings, ShampooSettings
from preconditioner_worker.tuning import Grid

GRIDS: Mapping[tuple[str, str], Grid] = {
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
    # In exact virtual steps, about as late as a service beside the training process: it repeats bit for bit.
    ("text", "shampoo"): Grid(
        workload="text",
        start=ShampooSettings(
            lr=4e-3,
            grafting_beta2=0.99,
            statistics_beta=0.99,
            weight_decay=0.1,
            service="local:10",
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
