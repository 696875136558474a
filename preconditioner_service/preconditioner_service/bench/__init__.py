"""Measurements of this software's parts, as commands."""

from __future__ import annotations

from pydantic import BaseModel
from pydantic_settings import CliApp, CliSubCommand

from .fuzz_roots import FuzzRoots
from .root_methods import BenchRootMethods
from .roots import BenchRoots

__all__ = ["Bench", "BenchRootMethods", "BenchRoots", "FuzzRoots"]


class Bench(BaseModel):
    """Measure or stress a part of the service on this host."""

    roots: CliSubCommand[BenchRoots]
    root_methods: CliSubCommand[BenchRootMethods]
    fuzz_roots: CliSubCommand[FuzzRoots]

    def cli_cmd(self) -> None:
        """Run the chosen subcommand."""
        CliApp.run_subcommand(self)
