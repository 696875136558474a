"""Fields of configuration dataclasses that hold an enumeration and take its values as strings, too."""

from __future__ import annotations

import enum
from typing import Any, Generic, TypeVar, cast

E = TypeVar("E", bound=enum.Enum)
L = TypeVar("L")


class Choice(Generic[E, L]):
    """A dataclass field that is written as a member of ``E`` or one of the literals ``L``, and read as ``E``.

    So ``StalenessConfig(policy="graft")`` passes a type checker, and ``config.policy`` is a member to it. As
    in ``policy: Choice[StalePolicy, Literal["wait", "graft"]] = Choice(StalePolicy.WAIT)``.

    Args:
        default: of the field.

    Raises:
        ValueError: when it is set to something else, naming the field, the value and what is possible.
    """

    def __init__(self, default: E) -> None:
        self._default = default
        self._kind = type(default)

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    # dataclasses read the default from the class.
    def __get__(self, instance: Any, owner: type | None = None) -> E:
        if instance is None:
            return self._default
        return cast(E, vars(instance)[self._name])

    def __set__(self, instance: Any, value: E | L) -> None:
        try:
            vars(instance)[self._name] = self._kind(value)
        except ValueError:
            known = ", ".join(repr(member.value) for member in self._kind)
            raise ValueError(f"{self._name} must be one of {known}, not {value!r}") from None
