"""Types of options, checked where they are given: an error names the option and its value."""

from __future__ import annotations

import dataclasses
import numbers
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

C = TypeVar("C", bound="DataclassInstance")


def check_number(name: str, value: object) -> None:
    """Refuse what is no real number: of Python or numpy, or a tensor that holds one.

    Raises:
        ValueError: naming the option and the value.
    """
    single = (isinstance(value, torch.Tensor) and value.numel() == 1) or (
        isinstance(value, np.ndarray) and value.ndim == 0
    )
    if not (single or isinstance(value, numbers.Real)):
        # YAML takes 1e-3 for text: only 1.0e-3 is a number to it.
        hint = "; in YAML write 1.0e-3 for 1e-3" if isinstance(value, str) else ""
        raise ValueError(f"{name} must be a number, not {value!r} of type {type(value).__name__}{hint}")


def python_number(value: Any) -> Any:
    """A number of numpy as Python's, since ``torch.load(weights_only=True)`` reads no other; else itself."""
    return value.item() if isinstance(value, np.generic | np.ndarray) and value.ndim == 0 else value


def check_numbers(settings: Any) -> None:
    """Hold the fields of a dataclass that are annotated ``int`` or ``float`` to it; a float may be an int.

    Raises:
        ValueError: naming the field and the value.
    """
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        # Annotations are strings, as their evaluation is postponed.
        kind, _, optional = str(field.type).partition(" | ")
        if optional == "None" and value is None:
            continue
        if kind == "int" and not isinstance(value, numbers.Integral):
            raise ValueError(
                f"{field.name} must be a whole number, not {value!r} of type {type(value).__name__}"
            )
        if kind == "float" and optional in ("", "None"):
            check_number(field.name, value)


def config(name: str, value: object, default: C) -> C:
    """The config that was given for an option, or its default.

    Raises:
        ValueError: it is of another class than the default; with the class that is needed.
    """
    if value is None:
        return default
    if not isinstance(value, type(default)):
        kind = type(default).__name__
        fields = [field.name for field in dataclasses.fields(type(default)) if field.init]
        raise ValueError(f"{name} must be a {kind}, not {value!r}: give {kind}({'=.., '.join(fields)}=..)")
    return value
