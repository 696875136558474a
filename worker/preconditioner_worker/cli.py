"""``preconditioner-worker``: the command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from pydantic import ValidationError

EXTRA = "install async-preconditioner[worker] from its checkout or wheel"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that ``arguments`` (default: the process's) name; exits non-zero on failure."""
    try:
        from pydantic import ValidationError
        from pydantic_settings import CliApp, SettingsError

        from preconditioner_client.exchange import ExchangeError
        from preconditioner_protos.history import HistoryError
        from preconditioner_worker.application import Application, UnknownKeyError
        from preconditioner_worker.faults.service import ServiceError
        from preconditioner_worker.results import ResultError
        from preconditioner_worker.workloads import WorkloadError
    except ModuleNotFoundError as error:
        fail(f"{error.name} is not installed; {EXTRA}", 2)
    try:
        CliApp.run(Application, cli_args=list(sys.argv[1:] if arguments is None else arguments))
    except ValidationError as error:
        fail(describe(error), 2)
    except (SettingsError, UnknownKeyError) as error:
        fail(str(error), 2)
    except (WorkloadError, ResultError, ExchangeError, HistoryError, ServiceError, TimeoutError) as error:
        fail(str(error), 1)
    except KeyboardInterrupt:
        fail("interrupted", 130)


def fail(message: str, status: int) -> NoReturn:
    """Say why, and exit."""
    print(f"preconditioner-worker: error: {message}", file=sys.stderr)
    raise SystemExit(status)


def describe(error: ValidationError) -> str:
    """Every mistake with the option's name and the value given."""
    return "\n".join(
        f"{'.'.join(str(part) for part in mistake['loc']).replace('_', '-')}: "
        f"{mistake['msg']}, not {mistake['input']!r}"
        for mistake in error.errors()
    )


if __name__ == "__main__":
    main()
