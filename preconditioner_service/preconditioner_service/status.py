"""``preconditioner-service status``: what a running service says of itself and of its jobs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pydantic import Field
from pydantic_settings import SettingsConfigDict
from rich.console import Console
from rich.table import Table
from rich.text import Text

from preconditioner_protos.v1 import preconditioner_pb2 as pb
from preconditioner_protos.v1 import preconditioner_pb2_grpc as rpc
from preconditioner_service.access import tokens_of
from preconditioner_service.command import CommandError
from preconditioner_service.probe import Probe

_WIDE = 200
"""Columns of a table that no terminal shows."""


class Status(Probe):
    """Show the service's state and the jobs that a token opens; a status token sees those of all."""

    model_config = SettingsConfigDict(cli_prog_name="preconditioner-service status")

    token_file: Path = Field(description="file that holds the token; of several the first is used")
    json_output: bool = Field(False, alias="json", description="one JSON object instead of a table")
    allow_plaintext: bool = Field(False, description="send the token off loopback without TLS, readable")

    def cli_cmd(self) -> None:
        """Ask, and print.

        Raises:
            CommandError: the service does not answer, or refuses the token.
            FileError: the token cannot be read.
        """
        if not (self.secure or self.local or self.allow_plaintext):
            raise CommandError(
                f"{self.address} is not loopback, and without TLS the token would travel readable: give "
                "--tls-ca or --tls, or accept it with --allow-plaintext"
            )
        metadata = (("authorization", f"Bearer {tokens_of(self.token_file)[0]}"),)
        status: pb.GetStatusResponse = self.ask(
            lambda channel: rpc.PreconditionerServiceStub(channel).GetStatus(  # type: ignore[no-untyped-call]
                pb.GetStatusRequest(), metadata=metadata, timeout=self.timeout
            )
        )
        fields = _fields(status)
        jobs = fields["jobs"] = [_fields(job) for job in status.jobs]
        if self.json_output:
            sys.stdout.write(json.dumps(fields) + "\n")
            return
        console = Console(width=None if sys.stdout.isatty() else _WIDE, highlight=False)
        state = "draining" if status.draining else "serving" if status.workers else "without workers"
        console.print(
            f"{state}, version {status.service_version}, {status.workers} workers, "
            f"up {status.uptime_seconds:.0f} s, {len(jobs)} jobs",
            markup=False,
        )
        if jobs:
            table = Table(box=None)
            for name in jobs[0]:
                table.add_column(name.replace("_", " "), justify="left" if name == "job" else "right")
            for job in jobs:
                table.add_row(*(Text(str(value)) for value in job.values()))
            console.print(table)


def _fields(message: pb.GetStatusResponse | pb.JobStatus) -> dict[str, Any]:
    """As they are named in the protocol, the zeros too."""
    return {field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields}
