"""What pydantic finds wrong, in words for people."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import CliPositionalArg

_POSITIONAL = get_args(CliPositionalArg[str])[1]


def explain(
    error: ValidationError, *, known: Iterable[str] = (), origins: Mapping[str, str] | None = None
) -> str:
    """One sentence per mistake, without the values, which may be secret.

    Args:
        error: what pydantic raised.
        known: names that an unknown one may have been meant as.
        origins: the file or variable that a setting came from, where it is not obvious.
    """
    known, origins = list(known), origins or {}
    sentences = []
    for mistake in error.errors(include_url=False, include_input=False, include_context=False):
        name = ".".join(str(part) for part in mistake["loc"])
        text = mistake["msg"].removeprefix("Value error, ")
        if mistake["type"] == "extra_forbidden":
            text = "unknown setting" + meant(str(mistake["loc"][-1]), known)
        if name:
            origin = origins.get(str(mistake["loc"][0]))
            sentences.append(f"{name} ({origin}): {text}" if origin else f"{name}: {text}")
        else:
            # Settings that do not fit each other: of those that are named, where they were made.
            made = [
                f"{setting} is set by {origin}"
                for setting, origin in sorted(origins.items())
                if origin and re.search(rf"\b{setting}\b", text)
            ]
            sentences.append(f"{text} ({', '.join(made)})" if made else text)
    return "; ".join(sentences)


def explain_arguments(text: str, arguments: Iterable[str], fields: Mapping[str, FieldInfo]) -> str:
    """What is wrong with a command line, without the values, which may be secret.

    Args:
        text: of the error of the parser, which shows the values of options that it does not know.
        arguments: the words.
        fields: of the settings that they were for.
    """
    known = set(_options(fields))
    given = dict.fromkeys(word.partition("=")[0] for word in arguments if word.startswith("--"))
    hints = {option: meant(option, known) for option in given if option not in known}
    before, unrecognized, _ = text.partition("unrecognized arguments: ")
    if not unrecognized:
        return text + "".join(hints.values())
    names = " ".join(f"{option}{hint}" for option, hint in hints.items())
    return before + unrecognized + (names or "words that belong to no option")


def _options(fields: Mapping[str, FieldInfo]) -> Iterator[str]:
    yield "--help"
    for name, field in fields.items():
        if _POSITIONAL in field.metadata:
            continue
        option = (field.alias or name).replace("_", "-")
        yield f"--{option}"
        if field.annotation is bool:
            yield f"--no-{option}"


def meant(name: str, known: Iterable[str]) -> str:
    """`` (did you mean ...?)`` if one of the known names is near, else nothing."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.7)
    return f" (did you mean {near[0]}?)" if near else ""
