"""Tokens: made, read from files, compared by digest."""

from __future__ import annotations

import pytest

from preconditioner_service import tokens
from preconditioner_service.tokens import TokenError


def test_new_tokens_are_random_and_fit_a_header():
    made = {tokens.new_token() for _ in range(100)}
    assert len(made) == 100
    for token in made:
        assert len(token) >= 43
        assert tokens.read_tokens(token) == [token]


def test_a_digest_is_shown_and_parsed():
    shown = tokens.show(tokens.digest("abc"))
    assert shown == "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert tokens.parse(shown) == tokens.digest(b"abc")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "abc-secret",
        "sha256:",
        "sha256:" + "0" * 63,
        "sha256:" + "g" * 64,
        "0" * 64,
        "sha256:" + " 0" * 32,
    ],
)
def test_what_is_no_digest_is_refused_and_not_shown(text):
    with pytest.raises(TokenError, match="64 hexadecimal digits") as caught:
        tokens.parse(text)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("header", "token"),
    [
        ("Bearer abc", "abc"),
        (b"Bearer abc", "abc"),
        ("bearer abc", None),
        ("abc", None),
        ("", None),
        ("Bearer " + "a" * 10_000, None),
    ],
)
def test_the_token_of_a_header(header, token):
    assert tokens.of_header(header) == (None if token is None else tokens.digest(token))


def test_strange_headers_are_wrong_tokens():
    assert tokens.of_header("Bearer \udcff") not in (None, tokens.digest("abc"))


def test_every_candidate_is_looked_at(monkeypatch):
    """So that the time tells nothing of which one matched."""
    looked_at = []

    def compare(given, candidate):
        looked_at.append(candidate)
        return given == candidate

    monkeypatch.setattr(tokens.hmac, "compare_digest", compare)
    known = [tokens.digest(name) for name in "abcd"]
    assert tokens.is_among(known[0], known)
    assert looked_at == known
    assert not tokens.is_among(tokens.digest("e"), known)
    assert looked_at == known * 2


def test_several_tokens_stand_on_lines():
    assert tokens.read_tokens("one\n\n  two\r\n") == ["one", "two"]
    with pytest.raises(TokenError, match="empty"):
        tokens.read_tokens("\n \n")
    with pytest.raises(TokenError, match="line 2") as caught:
        tokens.read_tokens("one\nsec ret\n")
    assert "ret" not in str(caught.value)
