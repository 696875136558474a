"""The settings behind the command line: which command, and where its options come from."""

from __future__ import annotations

import os
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_settings import (
    BaseSettings,
    CliApp,
    CliSubCommand,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from preconditioner_worker.bench_commands import Bench
from preconditioner_worker.commands import Compare, Demo, Headline, Train, Tune
from preconditioner_worker.faults.commands import CheckHistory, Soak
from preconditioner_worker.large_batch.commands import LargeBatch
from preconditioner_worker.rivals.commands import CurveballToys
from preconditioner_worker.staleness.commands import Staleness

PREFIX = "PRECONDITIONER_WORKER_"


class UnknownKeyError(ValueError):
    """The environment or the configuration file sets something that does not exist."""


class Application(BaseSettings):
    """Training workers for asynchronous Shampoo: train, compare, demonstrate, tune, measure.

    Options come from the command line, else from the environment (PRECONDITIONER_WORKER_TRAIN__STEPS=100),
    else from the command's section of the file given by --config, else from defaults. Hyperparameters that
    are not set are the tuned ones, where a tuning is committed.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter="__",
        extra="forbid",
        use_attribute_docstrings=True,
        nested_model_default_partial_update=True,
        cli_prog_name="preconditioner-worker",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
    )

    config: Path | None = None
    """TOML file with a section per command, as in [train]."""
    train: CliSubCommand[Train]
    compare: CliSubCommand[Compare]
    demo: CliSubCommand[Demo]
    tune: CliSubCommand[Tune]
    bench: CliSubCommand[Bench]
    soak: CliSubCommand[Soak]
    check_history: CliSubCommand[CheckHistory]
    staleness: CliSubCommand[Staleness]
    large_batch: CliSubCommand[LargeBatch]
    curveball_toys: CliSubCommand[CurveballToys]
    headline: CliSubCommand[Headline]

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The command line, which comes first by itself; then the environment, then the file."""
        check_environment(os.environ)
        return init_settings, env_settings, _File(settings_cls)

    def cli_cmd(self) -> None:
        """Run the command."""
        CliApp.run_subcommand(self)


class _File(PydanticBaseSettingsSource):
    """The file that an earlier source named."""

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        return None, field_name, False

    def __call__(self) -> dict[str, Any]:
        path = self.current_state.get("config")
        if path is None:
            return {}
        path = Path(path)
        if not path.is_file():
            raise UnknownKeyError(f"--config {str(path)!r}: there is no such file")
        try:
            content = TomlConfigSettingsSource(self.settings_cls, path)()
        except ImportError as error:  # Python 3.10 has no tomllib
            raise UnknownKeyError(f"--config {str(path)!r}: {error}") from error
        except ValueError as error:
            raise UnknownKeyError(f"--config {str(path)!r} is not TOML: {error}") from error
        for key in _unknown(content, Application):
            raise UnknownKeyError(f"--config {str(path)!r}: there is no option {key!r}")
        # Sections of other commands are right, but not wanted now.
        return {name: content[name] for name in content if isinstance(self.current_state.get(name), Mapping)}


def check_environment(environment: Mapping[str, str]) -> None:
    """Refuse a variable with our prefix that no option reads.

    Raises:
        UnknownKeyError: there is one.
    """
    known = {PREFIX + "__".join(path).upper() for path in _paths(Application)}
    for name in environment:
        if name.upper().startswith(PREFIX) and name.upper() not in known:
            raise UnknownKeyError(f"environment variable {name} is set, but there is no such option")


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        for argument in typing.get_args(annotation):
            yield from _models(argument)


def _paths(model: type[BaseModel]) -> Iterator[tuple[str, ...]]:
    """The path of every option, of sections too."""
    for name, field in model.model_fields.items():
        yield (name,)
        for nested in _models(field.annotation):
            for path in _paths(nested):
                yield (name, *path)


def _unknown(content: Mapping[str, Any], model: type[BaseModel]) -> Iterator[str]:
    """Keys of a file that are no option; dotted."""
    for name, value in content.items():
        if name not in model.model_fields:
            yield name
            continue
        for nested in _models(model.model_fields[name].annotation):
            if isinstance(value, Mapping):
                yield from (f"{name}.{key}" for key in _unknown(value, nested))
