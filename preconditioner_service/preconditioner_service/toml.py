"""TOML, which Python reads by itself from 3.11 on."""

from __future__ import annotations

from typing import Any


class TomlError(Exception):
    """The text is no TOML, or cannot be read here."""


def parse(data: bytes) -> dict[str, Any]:
    """The tables of a TOML text.

    Raises:
        TomlError: naming line and column.
    """
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        try:
            import tomli as tomllib  # type: ignore[import-not-found,no-redef,unused-ignore]
        except ModuleNotFoundError:
            raise TomlError("TOML needs Python 3.11, or 'pip install tomli'") from None
    try:
        return tomllib.loads(data.decode())
    except ValueError as error:
        raise TomlError(str(error)) from None
