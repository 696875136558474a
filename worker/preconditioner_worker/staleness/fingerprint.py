"""Which results may stand beside each other: those of the same code, settings and numerical libraries."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import platform
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch

from preconditioner_worker.staleness.specs import Record, StudySettings

# What a run's numbers depend on.
CODE = (
    "preconditioner_client.blocks",
    "preconditioner_client.config",
    "preconditioner_client.engine",
    "preconditioner_client.exchange",
    "preconditioner_client.grafting",
    "preconditioner_client.plan",
    "preconditioner_client.refresh",
    "preconditioner_client.roots",
    "preconditioner_client.shampoo",
    "preconditioner_client.stack",
    "preconditioner_client.update_rule",
    "preconditioner_protos.packing",
    "preconditioner_worker.optimizers",
    "preconditioner_worker.schedule",
    "preconditioner_worker.workloads.base",
    "preconditioner_worker.workloads.text",
    "preconditioner_worker.staleness.arms",
    "preconditioner_worker.staleness.controls",
    "preconditioner_worker.staleness.optimizers",
    "preconditioner_worker.staleness.specs",
    "preconditioner_worker.staleness.tasks",
    "preconditioner_worker.staleness.training",
)


class Fingerprint(Record):
    """Of a run.

    Attributes:
        settings: of the study.
        code: digest of the code in :data:`CODE`, comments, docstrings and layout left out.
        torch: version.
        numpy: version.
        cpu: instruction set that torch computes with; other ones round differently.
    """

    settings: StudySettings
    code: str
    torch: str
    numpy: str
    cpu: str

    @classmethod
    def here(cls, settings: StudySettings) -> Fingerprint:
        """Of a run that this process would make."""
        return cls(
            settings=settings,
            code=code_digest(),
            torch=torch.__version__,
            numpy=np.__version__,
            cpu=f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        )

    def differences(self, other: Fingerprint) -> list[str]:
        """What differs, as text with both values: ``steps 12000 is not 6000``."""
        found = []
        mine, others = self.model_dump(mode="json"), other.model_dump(mode="json")
        mine.update(mine.pop("settings"))
        others.update(others.pop("settings"))
        for name, value in mine.items():
            if value != others[name]:
                found.append(f"{name} {value} is not {others[name]}")
        return found


@cache
def code_digest() -> str:
    """Digest of the code in :data:`CODE`: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in _files():
        digest.update(normalised(path.read_text()).encode())
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


def _files() -> Iterator[Path]:
    for name in CODE:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"the code of {name} is not there", name=name)
        yield Path(spec.origin)
