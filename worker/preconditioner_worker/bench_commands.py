"""The commands under ``bench``: measurements of the parts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from pydantic_settings import CliApp, CliSubCommand
from rich.console import Console

from preconditioner_worker import bench_outage, bench_step, gpt2
from preconditioner_worker.workloads import WorkloadError, open_workload


class BenchStep(BaseModel):
    """Time optimizer.step() alone, or the whole training step, on GPT-2 small's shapes, against AdamW."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, validate_by_name=True, validate_by_alias=True
    )

    scale: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Of width, vocabulary and context; 1 is GPT-2 small itself."""
    layers: PositiveInt = gpt2.LAYERS
    """Of the model."""
    batch_size: PositiveInt | None = None
    """Sequences: time whole training steps, under bfloat16 autocast. Default: the optimizer's steps alone."""
    steps: PositiveInt = 100
    """Steps that are timed."""
    block_size: PositiveInt = 1024
    """Largest side of a block."""
    refresh_every: PositiveInt = 10
    """Steps between snapshots of a block."""
    threads: PositiveInt = 1
    """Threads of torch."""
    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")] = "cpu"
    """cpu, cuda or cuda:1."""
    service: str = "embedded"
    """Of the asynchronous contender: embedded or host:port."""
    json_file: Annotated[Path | None, Field(alias="json")] = None
    """Write the result to this file."""
    profile_file: Annotated[Path | None, Field(alias="profile")] = None
    """Write to this file which operators take the asynchronous contender's time."""

    def cli_cmd(self) -> None:
        """Measure, print, save."""
        if self.device != "cpu" and not torch.cuda.is_available():
            raise WorkloadError(f"--device {self.device}: torch finds no GPU here; leave it out for the CPU")
        torch.set_num_threads(self.threads)
        result = bench_step.benchmark(
            scale=self.scale,
            layers=self.layers,
            batch_size=self.batch_size,
            steps=self.steps,
            block_size=self.block_size,
            refresh_every=self.refresh_every,
            device=self.device,
            service=self.service,
            profile_file=self.profile_file,
        )
        Console().print(bench_step.table(result))
        if self.json_file is not None:
            bench_step.save(result, self.json_file)


class BenchOutage(BaseModel):
    """Time whole steps before and while a service is lost, within the bound, and how soon it serves again."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, validate_by_name=True, validate_by_alias=True
    )

    workload: str = "text"
    """text, translation, digits, digits-batchnorm or autoencoder."""
    seconds: Annotated[float, Field(gt=0)] = 60.0
    """Of the outage, and of the time before it."""
    how: bench_outage.How = "kill"
    """kill (SIGKILL, and started again) or freeze (SIGSTOP, and SIGCONT)."""
    max_staleness: PositiveInt = 100_000
    """The bound, which the outage must not exceed."""
    bound: Annotated[float, Field(gt=0)] = 1.05
    """The steps' 99th percentile during the outage may be so many times that before; no step may wait."""
    threads: PositiveInt = 1
    """Threads of torch."""
    json_file: Annotated[Path | None, Field(alias="json")] = None
    """Write the result to this file."""

    def cli_cmd(self) -> None:
        """Measure, print, save; the exit status is 1 if the outage cost the steps something."""
        torch.set_num_threads(self.threads)
        result = bench_outage.benchmark(
            open_workload(self.workload),
            seconds=self.seconds,
            how=self.how,
            max_staleness=self.max_staleness,
        )
        console = Console()
        console.print(bench_outage.table(result))
        found = bench_outage.shortcomings(result, self.bound)
        console.print(f"does not hold: {'; '.join(found)}" if found else "holds", soft_wrap=True)
        if self.json_file is not None:
            bench_outage.save(result, self.json_file)
        if found:
            sys.exit(1)


class Bench(BaseModel):
    """Measurements of the parts."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    step: CliSubCommand[BenchStep]
    outage: CliSubCommand[BenchOutage]

    def cli_cmd(self) -> None:
        """Run the measurement that was named."""
        CliApp.run_subcommand(self)
