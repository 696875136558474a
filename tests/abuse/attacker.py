"""Runs one attack: ``attacker.py CASE ADDRESS TOKEN SECONDS SIZE [WANTED ...]``; prints what it saw."""

from __future__ import annotations

import json
import os
import resource
import sys

import attacks


def main(case: str, address: str, token: str, seconds: str, size: str, *wanted: str) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    # An attacker has a machine of its own; here it should not win by taking the service's cores.
    os.nice(10)
    attack = attacks.Attack(address, token, float(seconds), int(size), frozenset(wanted))
    print("begun", flush=True)
    getattr(attacks, case)(attack)
    print(json.dumps(attack.saw), flush=True)
    os._exit(0)  # channels and sockets are dropped, not closed


if __name__ == "__main__":
    main(*sys.argv[1:])
