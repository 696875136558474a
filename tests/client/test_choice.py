"""Enumerations in settings are written as strings or members, and read as members.

What a type checker makes of that is in ``typed_choices.py``, which `make lint` checks.
"""

from __future__ import annotations

import copy
import dataclasses
import typing

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
