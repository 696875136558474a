"""The grids behind the committed tunings."""

from __future__ import annotations

from collections.abc import Mapping

from preconditioner_worker.optimizers import AdamWSettings
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
        ],
    ),
}
