"""The modules whose digest a result keeps are all that its numbers can depend on."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from preconditioner_worker.results import CODE
from preconditioner_worker.staleness.fingerprint import CODE as STUDY_CODE

PACKAGES = ("preconditioner_client.", "preconditioner_worker.", "preconditioner_protos.")
APART = {
    *(
        f"preconditioner_client.{module}"
        for module in ("adapters", "announcement", "checkpoint", "checkpoint_check", "closures", "connect",
                       "consolidation", "kfac.memory", "memory", "options", "recording",
                       "service_config", "service_exchange", "step_memory")
    ),
    *(
        f"preconditioner_worker.{module}"
        for module in ("code_digest", "machine", "progress", "results", "staleness.fingerprint",
                       "staleness.results")
    ),
}  # fmt: skip
"""What carries, keeps or tells of numbers and computes none; nor does what these alone import."""


def path_of(name: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:  # a name in a module
        return None
    return None if spec is None or spec.origin is None else Path(spec.origin)


@cache
def imports_of(name: str) -> tuple[tuple[str, str], ...]:
    """(module, name) of every ``from module import name`` of this software."""
    path = path_of(name)
    assert path is not None
    return tuple(
        (node.module, alias.name)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module and f"{node.module}.".startswith(PACKAGES)
        for alias in node.names
    )


def defining(module: str, name: str) -> str:
    """The module that defines what a package exports."""
    if path_of(f"{module}.{name}") is not None:
        return f"{module}.{name}"
    exported = [source for source, of_source in imports_of(module) if of_source == name]
    path = path_of(module)
    is_package = path is not None and path.name == "__init__.py"
    return defining(exported[0], name) if is_package and exported else module


def reached(*roots: str) -> Iterator[str]:
    todo, seen = list(roots), set(APART)
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            yield name
            todo += [defining(module, imported) for module, imported in imports_of(name)]


@pytest.mark.parametrize(
    ("code", "roots"),
    [
        (CODE, ("preconditioner_worker.training", "preconditioner_worker.contenders",
                "preconditioner_worker.workloads")),
        (STUDY_CODE, ("preconditioner_worker.staleness.training",)),
    ],
    ids=["runs", "study"],
)  # fmt: skip
def test_no_module_that_computes_is_left_out(code: tuple[str, ...], roots: tuple[str, ...]) -> None:
    # What is lacking belongs into the digest, or into APART if it computes nothing.
    assert sorted(set(reached(*roots)) - set(code)) == []
    assert len(set(code)) == len(code)


def test_what_stands_apart_exists() -> None:
    assert [name for name in sorted(APART) if path_of(name) is None] == []
