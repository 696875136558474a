"""The command line: ``preconditioner-service serve | health | status | token | certs | bench``."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

_USAGE = """\
usage: preconditioner-service COMMAND [OPTIONS]

commands:
  serve   compute preconditioners for training jobs: a gRPC server before a pool of Ray actors
  health  ask a running service whether it is ready, as a probe does
  status  show a running service's state and jobs
  token   make a bearer token
  certs   make a development authority and certificates for TLS
  bench   measure this machine's roots

'preconditioner-service COMMAND --help' lists the options of a command.
"""

_NEEDED = ("pydantic_settings", "cryptography", "grpc_health", "ray", "rich", "scipy", "threadpoolctl")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status: 2 for wrong arguments, 1 for what failed later."""
    command, *rest = list(sys.argv[1:] if arguments is None else arguments) or [""]
    commands: dict[str, Callable[[list[str]], int]] = {
        "serve": _serve,
        "health": _command("Health", "probe"),
        "status": _command("Status", "status"),
        "token": _command("Token", "commands"),
        "certs": _command("Certs", "commands"),
        "bench": _bench,
    }
    if command in ("-h", "--help"):
        sys.stdout.write(_USAGE)
        return 0
    if command not in commands:
        sys.stderr.write(_USAGE)
        sys.stderr.write(f"\nerror: unknown command {command!r}\n" if command else "\nerror: no command\n")
        return 2
    return commands[command](rest)


def _serve(arguments: list[str]) -> int:
    if (missing := _missing()) is not None:
        return _refuse(missing, 1)
    from preconditioner_service.logs import quiet_grpc

    quiet_grpc(os.environ)
    from pydantic import ValidationError
    from pydantic_settings import CliApp, SettingsError

    from preconditioner_service.mistakes import explain, explain_arguments
    from preconditioner_service.settings import ServeSettings
    from preconditioner_service.sources import origins

    try:
        settings = CliApp.run(ServeSettings, cli_args=arguments)
    except ValidationError as error:
        return _refuse(explain(error, known=ServeSettings.model_fields, origins=origins()), 2)
    except SettingsError as error:
        return _refuse(explain_arguments(str(error), arguments, ServeSettings.model_fields), 2)
    from preconditioner_service import serve

    return serve.run(settings, serve.claim_stdout())


def _bench(arguments: list[str]) -> int:
    if (missing := _missing()) is not None:
        sys.stderr.write(f"preconditioner-service bench: {missing}\n")
        return 1
    from pydantic_settings import BaseSettings, CliApp, SettingsConfigDict

    from preconditioner_service.bench import Bench

    class Command(Bench, BaseSettings):
        __doc__ = Bench.__doc__
        model_config = SettingsConfigDict(
            cli_prog_name="preconditioner-service bench",
            cli_kebab_case=True,
            cli_implicit_flags=True,
            cli_hide_none_type=True,
            cli_avoid_json=True,
        )

    CliApp.run(Command, cli_args=arguments)
    return 0


def _command(name: str, module: str) -> Callable[[list[str]], int]:
    """A class of settings with its ``cli_cmd``."""

    def run(arguments: list[str]) -> int:
        if (missing := _missing()) is not None:
            return complain(missing, 1)
        from pydantic import ValidationError
        from pydantic_settings import CliApp, CliSettingsSource, SettingsError

        from preconditioner_service.command import CommandError, add_option
        from preconditioner_service.files import FileError
        from preconditioner_service.logs import quiet_grpc
        from preconditioner_service.mistakes import explain, explain_arguments

        quiet_grpc(os.environ)
        command = getattr(importlib.import_module(f"preconditioner_service.{module}"), name)
        try:
            source = CliSettingsSource[Any](command, add_argument_method=add_option)
            CliApp.run(command, cli_args=arguments, cli_settings_source=source)
        except ValidationError as error:
            return complain(explain(error), 2)
        except SettingsError as error:
            return complain(explain_arguments(str(error), arguments, command.model_fields), 2)
        except (FileError, CommandError) as error:
            return complain(str(error), 1)
        return 0

    def complain(reason: str, status: int) -> int:
        sys.stderr.write(f"preconditioner-service {name.lower()}: {reason}\n")
        return status

    return run


def _missing() -> str | None:
    for name in _NEEDED:
        try:
            found = importlib.util.find_spec(name)
        except ImportError:
            found = None
        if found is None:
            return (
                f"{name} is not installed; the service needs the extra [service]: install "
                "async-preconditioner[service] from its checkout or wheel"
            )
    return None


def _refuse(reason: str, status: int) -> int:
    """Say why to people on stderr, and to a program on stdout."""
    import json

    sys.stderr.write(f"preconditioner-service serve: {reason}\n")
    sys.stdout.write(json.dumps({"event": "failed", "reason": reason}) + "\n")
    sys.stdout.flush()
    return status
