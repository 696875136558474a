"""The wheel, in an environment of its own: the client needs four packages, and never Ray."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]

USE_THE_CLIENT = """
import importlib.util, json, sys
import torch
from preconditioner_client import LocalExchange, Shampoo, StalenessConfig
weight = torch.nn.Parameter(torch.ones(4, 3))
staleness = StalenessConfig(refresh_every=1, max_staleness=5)
optimizer = Shampoo([weight], lr=1e-2, service=LocalExchange(), staleness=staleness)
for _ in range(3):
    weight.grad = torch.randn(4, 3)
    optimizer.step()
print(json.dumps({
    "adopted": optimizer.metrics()["versions_adopted"],
    "ray": importlib.util.find_spec("ray") is not None,
    "where": sys.modules["preconditioner_client"].__file__,
    "loaded": [name for name in ("ray", "pydantic", "preconditioner_service") if name in sys.modules],
}))
"""

EMBEDDED = """
import torch
from preconditioner_client import Shampoo
Shampoo([torch.nn.Parameter(torch.ones(4, 3))])
"""


def run(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=280
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    built = run(
        sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = folder.glob("*.whl")
    return path


def require(distribution: metadata.Distribution, seen: dict[str, metadata.Distribution]) -> None:
    """Add what a distribution requires without extras, and what that requires."""
    for line in distribution.requires or ():
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        if name not in seen and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            seen[name] = metadata.distribution(name)
            require(seen[name], seen)


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """An environment with the wheel and what it asks for, as it is installed here, and nothing else."""
    folder = tmp_path_factory.mktemp("environment")
    assert run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder).returncode == 0
    python = folder / "venv" / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index")
    installed = run(*pip, wheel, cwd=folder)
    assert installed.returncode == 0, installed.stderr
    (packages,) = folder.glob("venv/lib/python*/site-packages")
    needed: dict[str, metadata.Distribution] = {}
    (info,) = packages.glob("*.dist-info")
    require(metadata.Distribution.at(info), needed)
    for distribution in needed.values():
        for entry in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            # Packages of one namespace are in one folder, which one link makes known.
            if not (packages / entry).exists():
                (packages / entry).symlink_to(distribution.locate_file(entry))
    return python


def test_the_wheel_holds_the_four_packages_and_the_protocol(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in (
        "preconditioner_client",
        "preconditioner_protos",
        "preconditioner_service",
        "preconditioner_worker",
    ):
        assert f"{package}/__init__.py" in names
        assert f"{package}/py.typed" in names
    assert "preconditioner_protos/v1/preconditioner.proto" in names
    assert "preconditioner_protos/v1/preconditioner_pb2.pyi" in names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {
        "preconditioner_client",
        "preconditioner_protos",
        "preconditioner_service",
        "preconditioner_worker",
    }


@pytest.mark.slow
def test_the_client_works_without_ray_from_another_folder(environment, tmp_path):
    result = run(environment, "-c", USE_THE_CLIENT, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["adopted"] == 3
    assert not report["ray"]
    assert report["loaded"] == []
    assert "site-packages" in report["where"]


@pytest.mark.slow
def test_without_the_service_the_error_names_what_to_install(environment, tmp_path):
    result = run(environment, "-c", EMBEDDED, cwd=tmp_path)
    assert result.returncode != 0
    assert "async-preconditioner[service]" in result.stderr
    command = run(environment.parent / "preconditioner-service", "serve", cwd=tmp_path)
    assert command.returncode != 0
    assert "async-preconditioner[service]" in command.stderr


@pytest.mark.slow
def test_the_protocol_code_runs_with_the_oldest_protobuf_that_is_allowed(environment, tmp_path):
    old = tmp_path / "old"
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", old)
    installed = run(*pip, "protobuf==4.25.9", cwd=tmp_path)
    assert installed.returncode == 0, installed.stderr
    program = (
        f"import sys; sys.path.insert(0, {str(old)!r})\n"
        "import google.protobuf\n"
        "assert google.protobuf.__version__ == '4.25.9'\n"
        "from preconditioner_protos.v1 import preconditioner_pb2 as pb, preconditioner_pb2_grpc\n"
        "chunk = pb.MatrixChunk(block=3, payload=b'abc', crc32=7)\n"
        "assert pb.MatrixChunk.FromString(chunk.SerializeToString()) == chunk\n"
    )
    result = run(environment, "-c", program, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
