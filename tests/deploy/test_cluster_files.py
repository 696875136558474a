"""What is deployed is what exists: Ray's own validator, and the commands' own settings."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from preconditioner_service.settings import ServeSettings

ROOT = Path(__file__).parents[2]


def test_ray_accepts_the_cluster_file():
    config = yaml.safe_load((ROOT / "deploy" / "ray-cluster.yaml").read_text())
    prepared = prepare_config(config)
    validate_config(prepared)
    assert prepared["max_workers"] == 2


def options_of(command: str) -> set[str]:
    return {word.split("=")[0] for word in shlex.split(command.replace("\\\n", " ")) if word.startswith("--")}


def test_every_option_in_the_readme_and_the_container_exists():
    known = {"--" + name.replace("_", "-") for name in ServeSettings.model_fields}
    text = (ROOT / "deploy" / "README.md").read_text()
    commands = re.findall(r"serve\s*\\\n(?:.*\\\n)*.*", text)
    assert len(commands) == 2
    for command in commands:
        assert options_of(command) <= known, command
    last = (ROOT / "deploy" / "Containerfile").read_text().splitlines()[-1]
    assert set(re.findall(r"--[a-z-]+", last)) <= known


def test_every_package_of_the_service_image_is_pinned_and_torch_is_not_among_them():
    text = (ROOT / "deploy" / "Containerfile").read_text()
    match = re.search(r"constraints\.txt \\\n\s+(cryptography(?:.|\n)*?)&& useradd", text)
    assert match
    packages = match.group(1).replace("\\", " ").split()
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert set(packages) <= pinned
    assert "torch" not in packages
    assert "USER 10001" in text.split("AS service")[1]
