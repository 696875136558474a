"""The command ``curveball-toys``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from rich.console import Console

from preconditioner_worker.results import write_text
from preconditioner_worker.rivals import toys


class CurveballToys(BaseModel):
    """Iterations of CurveBall, SGD, Adam, BFGS and Levenberg-Marquardt on small degenerate problems."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, validate_by_name=True, validate_by_alias=True
    )

    seeds: PositiveInt = 100
    """Starts, and draws of the noise."""
    tuning_seeds: PositiveInt = 3
    """Others, which choose every method's one setting from its grid."""
    most: PositiveInt = 5000
    """Iterations after which a run is given up."""
    json_file: Annotated[Path | None, Field(alias="json")] = None
    """Write the result to this file."""

    def cli_cmd(self) -> None:
        """Run, print, save."""
        torch.set_num_threads(1)
        console = Console()

        def report(result: toys.ToyResult) -> None:
            text = f"{result.problem}: {result.method} solved {result.solved} of {result.seeds}"
            console.print(text, highlight=False, soft_wrap=True)

        study = toys.study(self.seeds, most=self.most, tuning_seeds=self.tuning_seeds, report=report)
        console.print(toys.table(study))
        if self.json_file is not None:
            write_text(self.json_file, study.model_dump_json(indent=1) + "\n")
