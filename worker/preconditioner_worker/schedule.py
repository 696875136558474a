"""The learning rate over a run: linear warm-up, then a cosine; defined by fractions of the run.

All optimizers share the shape; a run's own number of steps stretches it.
"""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Schedule(BaseModel):
    """Factor of the peak learning rate at each step.

    Attributes:
        warmup: share of the steps in which the factor climbs linearly to 1.
        floor: factor at the end.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    floor: Annotated[float, Field(ge=0, le=1)] = 0.0

    def factor(self, step: int, steps: int) -> float:
        """Factor at ``step`` (from 0) of ``steps``."""
        climb = self.warmup * steps
        if step + 1 <= climb:
            return (step + 1) / climb
        # The middle of the step: the last one is small but not wasted on a factor of zero.
        position = (step + 0.5 - climb) / (steps - climb)
        cosine = 0.5 * (1 + math.cos(math.pi * min(max(position, 0.0), 1.0)))
        return self.floor + (1 - self.floor) * cosine
