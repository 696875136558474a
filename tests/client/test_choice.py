"""Enumerations in settings are written as strings or members, and read as members; type checkers agree."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from preconditioner_client import (
    GraftingConfig,
    Ridge,
    StalenessConfig,
    StalePolicy,
    StatisticsConfig,
)
from preconditioner_client.choice import Choice

CHOICES = [
    (kind, field.name)
    for kind in (GraftingConfig, Ridge, StalenessConfig, StatisticsConfig)
    for field in dataclasses.fields(kind)
    if isinstance(vars(kind)[field.name], Choice)
]


@pytest.mark.parametrize(("kind", "name"), CHOICES)
def test_the_literals_are_all_the_values_of_the_enumeration(kind, name):
    enumeration, literals = typing.get_args(typing.get_type_hints(kind)[name])
    assert sorted(typing.get_args(literals)) == sorted(member.value for member in enumeration)


def test_a_string_becomes_a_member():
    config = StalenessConfig(policy="graft")
    assert config.policy is StalePolicy.GRAFT
    assert config == StalenessConfig(policy=StalePolicy.GRAFT)
    assert StalenessConfig().policy is StalePolicy.WAIT
    assert dataclasses.replace(config, policy="keep").policy is StalePolicy.KEEP
    assert copy.deepcopy(config) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.policy = "wait"


def test_another_string_is_refused_with_what_is_possible():
    with pytest.raises(ValueError, match="policy must be one of 'wait', 'graft', 'keep', not 'gratf'"):
        StalenessConfig(policy="gratf")


def test_strings_pass_a_type_checker_and_misspelt_ones_do_not(tmp_path):
    program = tmp_path / "user.py"
    program.write_text(
        "from preconditioner_client import GraftingConfig, Ridge, StalenessConfig, StalePolicy\n"
        "from preconditioner_client import StatisticsConfig\n"
        'config = StalenessConfig(policy="graft", adoption="eager")\n'
        "policy: StalePolicy = config.policy\n"
        'GraftingConfig(method="adam"), Ridge(kind="trace"), StatisticsConfig(accumulation="sum")\n'
        "StalenessConfig(policy=StalePolicy.WAIT)\n"
        'StalenessConfig(policy="gratf")\n'
    )
    root = Path(__file__).parents[2]
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", str(root / "pyproject.toml"), str(program)],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=250,
    )
    errors = [line for line in checked.stdout.splitlines() if ": error:" in line]
    assert len(errors) == 1, checked.stdout + checked.stderr
    assert "user.py:7: error:" in errors[0]
