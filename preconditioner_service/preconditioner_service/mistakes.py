"""What pydantic finds wrong, in words for people."""

from __future__ import annotations

from pydantic import ValidationError


def explain(error: ValidationError) -> str:
    """One sentence per mistake, without the values, which may be secret."""
    sentences = []
    for mistake in error.errors(include_url=False, include_input=False, include_context=False):
        name = ".".join(str(part) for part in mistake["loc"])
        text = mistake["msg"].removeprefix("Value error, ")
        if mistake["type"] == "extra_forbidden":
            text = "unknown setting"
        sentences.append(f"{name}: {text}" if name else text)
    return "; ".join(sentences)
