"""`python -m preconditioner_service.bench`."""

from pydantic_settings import CliApp

from . import Bench

CliApp.run(Bench)
