"""The catalogue of abuse: each attack, how large, and how it has to end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import attacks
from attacks import Attack


@dataclass(frozen=True)
class Case:
    """One attack.

    Attributes:
        attack: what the attacker does.
        size: connections, calls, sessions or requests a second, by the attack.
        expected: statuses and other ends of which each must have been seen.
        also: those that may be.
        shares: it works the workers as a job may, so that another job's fair share is half: it is judged by
            that, too.
    """

    attack: Callable[[Attack], None]
    size: int
    expected: frozenset[str]
    also: frozenset[str] = frozenset()
    shares: bool = False

    @property
    def name(self) -> str:
        return self.attack.__name__.replace("_", " ")


def _case(
    attack: Callable[[Attack], None], size: int, expected: str, also: str = "", *, shares: bool = False
) -> Case:
    return Case(
        attack, size, frozenset(expected.split(", ")), frozenset(filter(None, also.split(", "))), shares
    )


CASES = (
    _case(attacks.claims_of_huge_sides, 100, "RESOURCE_EXHAUSTED"),
    _case(attacks.million_blocks, 1, "RESOURCE_EXHAUSTED"),
    _case(attacks.large_manifests, 20_000, "OK", "UNAVAILABLE, RESOURCE_EXHAUSTED"),
    _case(attacks.gigabyte_messages, 1, "RESOURCE_EXHAUSTED"),
    _case(attacks.compressed_bombs, 1, "UNIMPLEMENTED"),
    _case(attacks.entry_floods, 1, "RESOURCE_EXHAUSTED"),
    _case(attacks.metadata_floods, 1, "RESOURCE_EXHAUSTED"),
    _case(attacks.idle_connections, 2000, "held, closed", "not connected"),
    _case(attacks.half_prefaces, 500, "closed", "still open"),
    _case(attacks.silent_calls, 1000, "UNAVAILABLE"),
    _case(attacks.trickled_calls, 300, "UNAVAILABLE"),
    _case(attacks.calls_without_token, 1000, "UNAUTHENTICATED"),
    _case(attacks.health_watchers, 1000, "RESOURCE_EXHAUSTED"),
    _case(attacks.silent_checks, 1000, "UNAVAILABLE"),
    _case(attacks.deaf_watchers, 1000, "OK"),
    _case(attacks.unread_answers, 1000, "OK", "RESOURCE_EXHAUSTED"),
    _case(attacks.rapid_resets, 1, "reset by the attacker", "goaway ENHANCE_YOUR_CALM, closed"),
    _case(attacks.pings, 1, "goaway ENHANCE_YOUR_CALM", "closed"),
    _case(attacks.status_calls, 1, "OK"),
    _case(attacks.old_epochs, 1, "ABORTED, FAILED_PRECONDITION"),
    _case(attacks.foreign_blocks, 1, "NACK_REASON_MALFORMED, FAILED_PRECONDITION", "stream ended"),
    _case(attacks.dropped_sessions, 1, "OK, RESOURCE_EXHAUSTED"),
    _case(attacks.unread_pushes, 40, "OK, RESOURCE_EXHAUSTED"),
    _case(attacks.tiny_chunks, 8, "receipts"),
    _case(attacks.snapshot_floods, 16, "receipts, pushed", shares=True),
)
