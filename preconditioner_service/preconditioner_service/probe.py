"""``preconditioner-service health``, light enough for a probe that starts it every few seconds."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pydantic import Field, model_validator
from pydantic_settings import CliPositionalArg, SettingsConfigDict

from preconditioner_service.command import Command, CommandError
from preconditioner_service.files import read
from preconditioner_service.machine import is_loopback


class Probe(Command):
    """One call to a running service."""

    address: CliPositionalArg[str] = Field(description="where the service listens, HOST:PORT")
    tls: bool = Field(False, description="use TLS with the authorities that gRPC knows; --tls-ca implies it")
    tls_ca: Path | None = Field(None, description="PEM roots that vouch for the service")
    tls_cert: Path | None = Field(None, description="PEM certificate chain of this client, for mutual TLS")
    tls_key: Path | None = Field(None, description="PEM private key of this client")
    tls_server_name: str | None = Field(
        None, description="name in the service's certificate, where it is not that of the address"
    )
    timeout: Annotated[float, Field(gt=0, le=3600)] = Field(5.0, description="seconds to wait for the answer")

    @model_validator(mode="after")
    def _consistent(self) -> Probe:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key are needed together")
        if not self.secure and (self.tls_cert is not None or self.tls_server_name is not None):
            raise ValueError("tls_cert, tls_key and tls_server_name need tls or tls_ca")
        return self

    @property
    def secure(self) -> bool:
        """Whether it goes over TLS."""
        return self.tls or self.tls_ca is not None

    @property
    def local(self) -> bool:
        """Whether it stays on this machine."""
        return is_loopback(self.address.rpartition(":")[0])

    def ask(self, call: Callable[[grpc.Channel], Any]) -> Any:
        """What the call answers.

        Raises:
            CommandError: nothing, or an error.
            FileError: a file of TLS cannot be read.
        """
        # A proxy, which gRPC otherwise asks for every address, cannot reach this machine.
        options: list[tuple[str, str | int]] = [("grpc.enable_http_proxy", 0)] if self.local else []
        if self.tls_server_name is not None:
            options.append(("grpc.ssl_target_name_override", self.tls_server_name))
        if self.secure:
            root, key, chain = (
                None if path is None else read(path, name)
                for name, path in (
                    ("tls_ca", self.tls_ca),
                    ("tls_key", self.tls_key),
                    ("tls_cert", self.tls_cert),
                )
            )
            credentials = grpc.ssl_channel_credentials(root, key, chain)
            channel = grpc.secure_channel(self.address, credentials, options)
        else:
            channel = grpc.insecure_channel(self.address, options)
        with channel:
            try:
                return call(channel)
            except grpc.RpcError as error:
                code: grpc.StatusCode = error.code()
                hint = ""
                if code is grpc.StatusCode.UNAVAILABLE:
                    hint = (
                        "; is it there, and are --tls-ca, --tls-server-name and --tls-cert right?"
                        if self.secure
                        else "; is it there, and without TLS? Else give --tls-ca"
                    )
                raise CommandError(f"{self.address}: {code.name}: {error.details()}{hint}") from None


class Health(Probe):
    """Ask whether the service is ready: exit status 0 if it is SERVING, else 1. Needs no token."""

    model_config = SettingsConfigDict(cli_prog_name="preconditioner-service health")

    def cli_cmd(self) -> None:
        """Ask.

        Raises:
            CommandError: it is not SERVING.
        """
        request = health_pb2.HealthCheckRequest()
        answer = self.ask(
            lambda channel: health_pb2_grpc.HealthStub(channel).Check(request, timeout=self.timeout)
        )
        state = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
        if answer.status != health_pb2.HealthCheckResponse.SERVING:
            raise CommandError(f"{self.address}: {state}")
        sys.stdout.write(f"{state}\n")
