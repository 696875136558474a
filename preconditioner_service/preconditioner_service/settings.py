"""Settings of ``preconditioner-service serve``.

Precedence: argument, then environment (``PRECONDITIONER_SERVICE_*``), then file (``--config``, TOML), then
default. Unknown keys are errors everywhere, as a setting with a typing mistake is a setting that is not made.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from preconditioner_protos import MAX_MESSAGE_BYTES
from preconditioner_service.access import open_policy
from preconditioner_service.machine import default_workers, is_loopback, physical_memory
from preconditioner_service.policy import Policy
from preconditioner_service.quotas import Quotas
from preconditioner_service.reloading import Reloading
from preconditioner_service.sources import ENV_PREFIX, Environment, TomlFile
from preconditioner_service.tls import ServerTls
from preconditioner_service.tokens import read_tokens

MIB = 1024 * 1024

PositiveInt = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveSeconds = Annotated[float, Field(gt=0, le=30 * 86400, allow_inf_nan=False)]


PositiveLimit = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class ServeSettings(BaseSettings):
    """Compute preconditioners for training jobs: a gRPC server before a pool of Ray actors."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        extra="forbid",
        hide_input_in_errors=True,
        cli_prog_name="preconditioner-service serve",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_exit_on_error=False,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        validate_default=True,
    )

    config: Path | None = Field(None, description="TOML file with any of these settings")

    # Where trainers connect.
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(0, ge=0, le=65535, description="0 takes any free one; the ready line names it")
    token: SecretStr | None = Field(
        None,
        description=f"bearer token of all calls; prefer {ENV_PREFIX}TOKEN or --token-file to an argument",
    )
    token_file: Path | None = Field(None, description="file that holds the token, or several, one a line")
    jobs_file: Path | None = Field(
        None, description="TOML file of the tokens, weight and quotas of each job; see the service's README"
    )
    tls_cert: Path | None = Field(None, description="PEM certificate chain of the server")
    tls_key: Path | None = Field(None, description="PEM private key of the server")
    tls_client_ca: Path | None = Field(
        None, description="PEM roots; clients must show a certificate of theirs"
    )
    allow_plaintext: bool = Field(
        False, description="listen off loopback without TLS: tokens travel readable"
    )
    reflection: bool = Field(False, description="gRPC server reflection, for grpcurl and the like")

    # The pool.
    ray_address: str | None = Field(
        None, description="existing Ray cluster, host:port or auto; without it a private one is started"
    )
    num_workers: PositiveInt = Field(
        default_workers(),
        description="Ray actors that compute roots; as many as cores that may be used, and of embedded "
        "services beside the ranks of torchrun each a rank's part",
    )
    cpus_per_worker: PositiveInt = Field(1, description="cores of every actor; BLAS is bound to them")
    worker_memory_bytes: int | None = Field(
        None, ge=1, description="memory that Ray reserves for every actor, for placement"
    )
    worker_nice: int = Field(
        0,
        ge=0,
        le=19,
        description="niceness of the actors, on top of the service's own where Ray is private; 15 lets "
        "training on the same cores go first",
    )
    object_store_bytes: int = Field(
        256 * MIB, ge=80 * MIB, description="shared memory of the private Ray, for batches under way"
    )
    start_timeout: PositiveSeconds = Field(
        180.0,
        description="seconds until the first actor lives; a busy machine takes its time, and so does a "
        "cluster that adds a node for it",
    )

    batch_patience: float = Field(
        60.0,
        gt=0,
        allow_inf_nan=False,
        description="seconds beyond 20 times its estimate after which a batch is lost, its actor restarted",
    )
    quarantine_after: PositiveInt = Field(
        3, description="actors that must die on a block in a row before its snapshots are refused"
    )
    quarantine_seconds: Seconds = Field(
        300.0, description="until such a block is tried again; SIGUSR1 ends all quarantines at once"
    )

    # Limits.
    max_message_bytes: int = Field(
        MAX_MESSAGE_BYTES, ge=64 * 1024, le=64 * MIB, description="largest message, either way"
    )
    credit_bytes: int = Field(64 * MIB, ge=MIB, description="packed bytes unanswered per stream, either way")
    session_ttl: Seconds = Field(60.0, description="seconds that a session outlives its broken stream")
    drain_grace: Seconds = Field(20.0, description="seconds to finish acknowledged work after SIGTERM")
    max_sessions: PositiveInt = Field(4096, description="of a job, one per rank")
    max_blocks: PositiveInt = Field(65536, description="of a job, over all ranks")
    max_side: PositiveInt = Field(8192, description="largest side of a block")
    max_in_flight_seconds: PositiveLimit | None = Field(
        None, description="estimated work of a job at the workers at a time; one block always may be"
    )
    max_refresh_rate: PositiveLimit | None = Field(
        None, description="blocks of a job that are computed a second; beyond it they wait, the newest wins"
    )
    max_job_bytes: int = Field(
        physical_memory() // 4,
        ge=1,
        description="statistics and preconditioners of a job; a quarter of the memory",
    )
    max_total_bytes: int = Field(
        physical_memory() // 2,
        ge=1,
        description="the same of all jobs, with bookkeeping and messages under way; half of the memory",
    )
    max_streams: PositiveInt = Field(1024, description="calls at a time, streams among them")
    max_streams_per_connection: PositiveInt = Field(128, description="calls at a time of one connection")
    max_connections: PositiveInt = Field(1024, description="connections at a time; further ones are closed")
    max_call_rate: PositiveLimit = Field(
        400.0, description="calls that begin a second, beyond those of one second at once; further ones wait"
    )
    max_waiting_calls: PositiveInt = Field(
        16, description="calls whose first message has not come; a further one displaces the oldest"
    )
    max_health_watchers: PositiveInt = Field(64, description="Watch calls of the health service at a time")
    max_metadata_bytes: int = Field(16 * 1024, ge=4096, description="of a call's metadata")
    first_message_timeout: PositiveSeconds = Field(
        10.0, description="seconds that a call may stay without its first message"
    )
    answer_timeout: PositiveSeconds = Field(
        10.0, description="seconds that a caller may take to receive an answer"
    )
    stream_idle_timeout: PositiveSeconds = Field(
        3600.0, description="seconds that a stream may stay without a message from the trainer"
    )
    handshake_timeout: PositiveSeconds = Field(
        10.0, description="seconds that a connection may take to begin (TLS, HTTP/2)"
    )
    connection_idle_timeout: PositiveSeconds = Field(
        300.0, description="seconds that a connection may stay without a call"
    )

    # Logs and embedding.
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least severe events that are logged"
    )
    log_format: Literal["text", "json"] = Field(
        "text", description="one line, or one JSON object, per event on stderr"
    )
    parent_pid: int | None = Field(
        None, ge=1, description="stop when this process, which must be the parent, is gone"
    )
    ready_file: Path | None = Field(None, description="also write the ready line to this file")
    history_file: Path | None = Field(
        None, description="append what happens to this file, for preconditioner-worker check-history"
    )
    history_matrices: Path | None = Field(
        None, description="folder to save snapshots and preconditioners to; needs --history-file"
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments (put before these by the CLI), environment, file."""
        return init_settings, Environment(settings_cls, env_settings), TomlFile(settings_cls)

    @field_validator("ray_address")
    @classmethod
    def _no_ray_client(cls, address: str | None) -> str | None:
        if address is not None and address.startswith("ray://"):
            raise ValueError(
                "ray:// is Ray Client, which copies all data through one process: start the service on a "
                "node of the cluster and give the address of its head, host:port, or auto"
            )
        return address

    @field_validator("token")
    @classmethod
    def _one_token(cls, token: SecretStr | None) -> SecretStr | None:
        if token is None:
            return None
        found = read_tokens(token.get_secret_value())
        if len(found) > 1:
            raise ValueError("holds several lines; --token-file may")
        return SecretStr(found[0])

    @model_validator(mode="after")
    def _consistent(self) -> ServeSettings:
        if [self.token, self.token_file, self.jobs_file].count(None) != 2:
            raise ValueError(
                f"one of token, token_file and jobs_file is needed: set {ENV_PREFIX}TOKEN, or give "
                "--token-file PATH or --jobs-file PATH; 'preconditioner-service token PATH' makes a token"
            )
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key are needed together")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("tls_client_ca needs tls_cert and tls_key")
        if self.history_matrices is not None and self.history_file is None:
            raise ValueError("history_matrices needs history_file, which names the matrices")
        if self.tls_cert is None and not self.allow_plaintext and not is_loopback(self.host):
            raise ValueError(
                f"host {self.host} is not loopback and there is no TLS, so the token would travel readable: "
                "give --tls-cert and --tls-key, or accept it with --allow-plaintext"
            )
        return self

    def open_policy(self) -> Reloading[Policy]:
        """Who may call, and what each job may have.

        Raises:
            FileError: the token or jobs file cannot be used.
        """
        return open_policy(
            token=None if self.token is None else self.token.get_secret_value(),
            token_file=self.token_file,
            jobs=self.jobs_file,
            defaults=Quotas(
                max_sessions=self.max_sessions,
                max_blocks=self.max_blocks,
                max_side=self.max_side,
                max_job_bytes=self.max_job_bytes,
                max_in_flight_seconds=self.max_in_flight_seconds or math.inf,
                max_refresh_rate=self.max_refresh_rate or math.inf,
            ),
        )

    def open_tls(self) -> ServerTls:
        """What TLS handshakes are made with; needs ``tls_cert``.

        Raises:
            FileError: a certificate or key cannot be used.
        """
        assert self.tls_cert is not None
        assert self.tls_key is not None  # by _consistent
        return ServerTls(self.tls_cert, self.tls_key, self.tls_client_ca)
