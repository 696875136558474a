"""Bearer tokens: how they are made, read from files, and compared.

Callers are held against SHA-256 digests. A token that this package makes has 256 random bits, so that
its digest needs neither salt nor a slow hash.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable

PREFIX = "sha256:"
SCHEME = b"Bearer "
_MOST_HEADER_BYTES = 4096


class TokenError(ValueError):
    """What should be a token, or the digest of one, is not; the text never shows it."""


def new_token() -> str:
    """A new random token, in characters that need no quoting anywhere."""
    return secrets.token_urlsafe(32)


def digest(token: str | bytes) -> bytes:
    """The SHA-256 of a token."""
    return hashlib.sha256(token.encode() if isinstance(token, str) else token).digest()


def show(token_digest: bytes) -> str:
    """A digest as it stands in a jobs file."""
    return PREFIX + token_digest.hex()


def parse(text: str) -> bytes:
    """The digest that a jobs file holds.

    Raises:
        TokenError: it is none.
    """
    try:
        found = bytes.fromhex(text.removeprefix(PREFIX))
    except ValueError:
        found = b""
    if not text.startswith(PREFIX) or len(text) != len(PREFIX) + 64 or len(found) != 32:
        raise TokenError(
            "must be 'sha256:' and 64 hexadecimal digits, as 'preconditioner-service token FILE' prints; "
            "tokens themselves do not belong here"
        )
    return found


def read_tokens(text: str) -> list[str]:
    """The tokens of a token file, one a line.

    Raises:
        TokenError: there is none, or one could not stand in an HTTP header.
    """
    tokens = [line.strip() for line in text.splitlines() if line.strip()]
    if not tokens:
        raise TokenError("is empty")
    for number, token in enumerate(tokens, 1):
        if not all("!" <= character <= "~" for character in token):
            raise TokenError(
                f"line {number} holds white space or characters outside of ASCII, which no token has"
            )
    return tokens


def of_header(header: str | bytes) -> bytes | None:
    """The digest of the token in an ``authorization`` header; ``None`` if it carries none."""
    given = header if isinstance(header, bytes) else header.encode("utf-8", "surrogateescape")
    if len(given) > _MOST_HEADER_BYTES or not given.startswith(SCHEME):
        return None
    return digest(given.removeprefix(SCHEME))


def is_among(given: bytes, known: Iterable[bytes]) -> bool:
    """Whether a digest is one of these; looks at all of them, each in constant time."""
    found = False
    for candidate in known:
        found |= hmac.compare_digest(given, candidate)
    return found
