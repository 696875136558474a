"""Measurements of this software's parts, as commands."""

from __future__ import annotations

from pydantic import BaseModel
from pydantic_settings import CliApp, CliSubCommand

from .fuzz_roots import FuzzRoots
from .roots import BenchRoots

__all__ = ["Bench", "BenchRoots", "FuzzRoots"]


class Bench(BaseModel):
    """Measure or stress a part of the service on this host."""

    roots: CliSubCommand[BenchRoots]
    fuzz_roots: CliSubCommand[FuzzRoots]

    def cli_cmd(self) -> None:
        """Run the chosen subcommand."""
        CliApp.run_subcommand(self)
