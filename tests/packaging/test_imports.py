"""Imports run one way: worker -> client -> protos <- service. No torch in the server, no Ray in a trainer."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

FORBIDDEN = {
    "protos": {"preconditioner_client", "preconditioner_service", "preconditioner_worker", "torch", "ray"},
    "client": {"preconditioner_service", "preconditioner_worker", "ray", "pydantic", "scipy"},
    "preconditioner_service": {"preconditioner_client", "preconditioner_worker", "torch"},
    "worker": {"preconditioner_service"},
}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("component", FORBIDDEN)
def test_no_module_imports_against_the_direction(component):
    files = list((ROOT / component).glob("preconditioner_*/**/*.py"))
    assert files
    offenders = {str(path): bad for path in files if (bad := imported(path) & FORBIDDEN[component])}
    assert not offenders


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("preconditioner_client", ("ray", "preconditioner_service")),
        ("preconditioner_service.server", ("torch", "preconditioner_client")),
        ("preconditioner_protos", ("torch", "ray")),
    ],
)
def test_importing_loads_nothing_of_the_other_side(module, absent):
    program = f"import sys, {module}; print([m for m in {absent!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
