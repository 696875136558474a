"""Where settings come from besides arguments: the environment and a TOML file, with unknown names refused."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsError

from preconditioner_service import toml
from preconditioner_service.mistakes import meant

ENV_PREFIX = "PRECONDITIONER_SERVICE_"

_ADDRESS = re.compile(r"(tcp|udp|sctp)://")

_origins: ContextVar[Mapping[str, str]] = ContextVar("origins")


def origins() -> Mapping[str, str]:
    """Of the settings that were read last: the variable or file that each came from; empty for arguments."""
    return _origins.get({})


def service_links(environ: Mapping[str, str]) -> set[str]:
    """Names of variables that Kubernetes sets in every pod for the Services of its namespace.

    A Service ``x`` has ``X_PORT=tcp://ADDRESS:PORT``, which nothing else looks like; with it come
    ``X_SERVICE_HOST``, ``X_SERVICE_PORT``, ``X_SERVICE_PORT_<NAME>`` and ``X_PORT_<NUMBER>_TCP`` with its
    parts (https://kubernetes.io/docs/concepts/services-networking/service, "Environment variables").
    """
    services = [
        name.removesuffix("PORT")
        for name, value in environ.items()
        if name.endswith("_PORT") and _ADDRESS.match(value)
    ]
    if not services:
        return set()
    link = re.compile(
        f"({'|'.join(map(re.escape, services))})"
        r"(PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?|SERVICE_(HOST|PORT(_[A-Z0-9_]+)?))"
    )
    return {name for name in environ if link.fullmatch(name)}


class Environment(PydanticBaseSettingsSource):
    """The environment, with unknown ``PRECONDITIONER_SERVICE_*`` names refused."""

    def __init__(self, settings_cls: type[BaseSettings], source: PydanticBaseSettingsSource) -> None:
        super().__init__(settings_cls)
        self._source = source

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Part of the interface; not used, as the source is read as a whole."""
        return self._source.get_field_value(field, field_name)

    def __call__(self) -> dict[str, Any]:
        """Read it."""
        known = {ENV_PREFIX + name.upper() for name in self.settings_cls.model_fields}
        links = service_links(os.environ)
        unknown = sorted(
            name
            for name in os.environ
            if name.upper().startswith(ENV_PREFIX) and name.upper() not in known and name not in links
        )
        if unknown:
            raise SettingsError(
                "unknown in the environment: "
                + ", ".join(name + meant(name.upper(), known) for name in unknown)
            )
        values = self._source()
        # Of a Service `preconditioner-service`; one called `preconditioner` has values that may be meant.
        if _ADDRESS.match(str(values.get("port", ""))):
            del values["port"]
        return values


class TomlFile(PydanticBaseSettingsSource):
    """The file that ``config`` names, which arguments or environment have set; the last of the sources."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Part of the interface; not used, as the file is read as a whole."""
        return None, field_name, False

    def __call__(self) -> dict[str, Any]:
        """Read it, and note where everything came from."""
        read_before = dict(self.settings_sources_data)
        variables = read_before.pop(Environment.__name__, {})
        arguments = {name for values in read_before.values() for name in values}
        path = self.current_state.get("config")
        read = {} if path is None else _read_toml(Path(path))
        _origins.set(
            dict.fromkeys(read, str(path))
            | {name: ENV_PREFIX + name.upper() for name in variables}
            | dict.fromkeys(arguments, "")
        )
        return read


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return toml.parse(path.read_bytes())
    except (OSError, toml.TomlError) as error:
        raise SettingsError(f"config {path}: {error}") from None
