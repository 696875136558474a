"""What the commands beside ``serve`` have in common."""

from __future__ import annotations

from argparse import Action, ArgumentParser
from typing import Any

from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict


class CommandError(Exception):
    """The command cannot do what it was asked for; the text says why."""


def add_option(parser: ArgumentParser, *names: str, **options: Any) -> Action:
    """Add an option, where it may be repeated with what it takes once: ``HOST``, not ``list[str]``."""
    if str(options.get("metavar")).startswith("list["):
        options["metavar"] = names[0].lstrip("-").upper()
    return parser.add_argument(*names, **options)


class Command(BaseSettings):
    """Arguments alone: a variable of the environment that is called HOST has no say here."""

    model_config = SettingsConfigDict(
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        cli_exit_on_error=False,
        extra="forbid",
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
        """No others; the arguments come before it."""
        return (init_settings,)
