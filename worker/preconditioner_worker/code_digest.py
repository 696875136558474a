"""A digest of the code that a result depends on: results of other code must not be mixed with it."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path

# What the numbers of Shampoo depend on.
CLIENT = (
    "preconditioner_client.agreement",
    "preconditioner_client.averaging",
    "preconditioner_client.blocks",
    "preconditioner_client.choice",
    "preconditioner_client.config",
    "preconditioner_client.distribution",
    "preconditioner_client.engine",
    "preconditioner_client.exchange",
    "preconditioner_client.foreach",
    "preconditioner_client.gradients",
    "preconditioner_client.grafting",
    "preconditioner_client.groups",
    "preconditioner_client.guard",
    "preconditioner_client.held_blocks",
    "preconditioner_client.plan",
    "preconditioner_client.preconditioned_optimizer",
    "preconditioner_client.refresh",
    "preconditioner_client.roots",
    "preconditioner_client.schedule",
    "preconditioner_client.shampoo",
    "preconditioner_client.sharing",
    "preconditioner_client.stack",
    "preconditioner_client.transfer",
    "preconditioner_client.update_rule",
    "preconditioner_protos.packing",
)


def code_digest(modules: Sequence[str]) -> str:
    """Digest of the code of ``modules``, comments, docstrings and layout left out: 16 hexadecimal digits.

    Raises:
        ModuleNotFoundError: one is not there.
    """
    return _digest(tuple(modules))


@cache
def _digest(modules: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for name in modules:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"the code of {name} is not there", name=name)
        digest.update(normalised(Path(spec.origin).read_text()).encode())
    return digest.hexdigest()[:16]


def normalised(source: str) -> str:
    """Source as it runs: without comments, docstrings and layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            rest = [part for part in node.body if not _is_text(part)]
            node.body = rest or [ast.Pass()]
    return ast.unparse(tree)


def _is_text(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
