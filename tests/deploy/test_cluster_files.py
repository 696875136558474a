"""What is deployed is what exists: Ray's own validator, and the commands' own settings."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import yaml
from pydantic_settings import CliSettingsSource
from ray.autoscaler._private.util import prepare_config, validate_config

from preconditioner_service.probe import Health
from preconditioner_service.settings import ServeSettings
from preconditioner_service.status import Status

ROOT = Path(__file__).parents[2]


def test_ray_accepts_the_cluster_file():
    config = yaml.safe_load((ROOT / "deploy" / "ray-cluster.yaml").read_text())
    prepared = prepare_config(config)
    validate_config(prepared)
    assert prepared["max_workers"] == 2


def test_the_cluster_installs_the_wheel_that_it_is_sent():
    config = yaml.safe_load((ROOT / "deploy" / "ray-cluster.yaml").read_text())
    assert config["file_mounts"]["~/wheels"] == "dist"
    assert any("~/wheels/async_preconditioner-*.whl" in command for command in config["setup_commands"])


def test_the_newest_wheel_is_installed_where_there_are_several():
    text = (ROOT / "deploy" / "README.md").read_text()
    assert '"$(ls -t dist/async_preconditioner-*.whl | head -1)[service]"' in text


def options_of(command: str) -> set[str]:
    return {word.split("=")[0] for word in shlex.split(command.replace("\\\n", " ")) if word.startswith("--")}


def test_every_option_in_the_readme_and_the_container_exists():
    known = {"--" + name.replace("_", "-") for name in ServeSettings.model_fields}
    text = (ROOT / "deploy" / "README.md").read_text()
    commands = re.findall(r"serve\s*\\\n(?:.*\\\n)*.*", text)
    assert len(commands) == 3
    for command in commands:
        assert options_of(command) <= known, command
    last = (ROOT / "deploy" / "Containerfile").read_text().splitlines()[-1]
    assert set(re.findall(r"--[a-z-]+", last)) <= known


def test_health_and_status_in_the_readme_have_their_options():
    text = (ROOT / "deploy" / "README.md").read_text()
    for name, command in (("health", Health), ("status", Status)):
        known = {
            "--" + (field.alias or name).replace("_", "-") for name, field in command.model_fields.items()
        }
        lines = re.findall(rf"^preconditioner-service {name} (?:.*\\\n)*.*", text, re.MULTILINE)
        assert lines
        for line in lines:
            assert options_of(line.replace("#", "")) <= known, line


def test_the_pod_drains_before_it_is_killed_and_is_probed_over_tls():
    text = (ROOT / "deploy" / "README.md").read_text()
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    pod = yaml.safe_load(block)["spec"]
    grace = ServeSettings.model_fields["drain_grace"].default
    assert pod["terminationGracePeriodSeconds"] >= 2 * grace
    assert {int(seconds) for seconds in re.findall(r"(?:--stop-timeout |TimeoutStopSec=)(\d+)", text)} == {60}
    assert pod["enableServiceLinks"] is False
    (container,) = pod["containers"]
    known = {"--" + name.replace("_", "-") for name in ServeSettings.model_fields}
    assert {word for word in container["args"] if word.startswith("--")} <= known
    program, name, *arguments = container["readinessProbe"]["exec"]["command"]
    assert (program, name) == ("preconditioner-service", "health")
    CliSettingsSource(Health, cli_parse_args=arguments)
    seconds = float(arguments[arguments.index("--timeout") + 1])
    waits = ServeSettings.model_fields["max_connections"].default * 3 // 2
    assert waits / ServeSettings.model_fields["max_call_rate"].default < seconds, "a flood only delays it"
    assert seconds < container["readinessProbe"]["timeoutSeconds"], "it says itself what is wrong"
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_the_build_is_sent_what_it_copies_and_nothing_else():
    text = (ROOT / "deploy" / "Containerfile").read_text().partition("AS client")[0]
    copied = {word for line in re.findall(r"^COPY (.*)", text, re.MULTILINE) for word in line.split()[:-1]}
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert {line[1:] for line in lines if line.startswith("!")} == copied
    assert lines.index("*") < min(number for number, line in enumerate(lines) if line.startswith("!"))


def test_pythons_without_toml_get_it_in_the_image():
    assert "\"tomli; python_version < '3.11'\"" in (ROOT / "deploy" / "Containerfile").read_text()
    assert re.search(
        r"^tomli==.*python_version < '3.11'$", (ROOT / "constraints.txt").read_text(), re.MULTILINE
    )


def test_every_package_of_the_service_image_is_pinned_and_torch_is_not_among_them():
    text = (ROOT / "deploy" / "Containerfile").read_text()
    match = re.search(r"constraints\.txt \\\n\s+(cryptography(?:.|\n)*?)&& useradd", text)
    assert match
    packages = match.group(1).replace("\\", " ").split()
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert set(packages) <= pinned
    assert "torch" not in packages
    assert "USER 10001" in text.split("AS service")[1]
