"""Every attack at its full size, and a table of what became of it: ``make abuse``.

Options: ``--seconds S`` of each attack, and names of attacks, to run these alone.
"""

from __future__ import annotations

import argparse
import sys

from cases import CASES
from measure import ALLOWANCE, BUDGET, MIB, SETTINGS, HonestJob, Outcome, measure
from rich.console import Console
from rich.table import Table

from service_process import ServiceProcess


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="attacks, default all")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each attack (default %(default)s)")
    options = parser.parse_args()
    chosen = [case for case in CASES if not options.names or case.attack.__name__ in options.names]
    with ServiceProcess(workers=2, arguments=SETTINGS) as service:
        honest = HonestJob(service)
        outcomes: list[Outcome] = []
        for case in chosen:
            outcomes += measure(service, honest, [case], options.seconds, fair_share=True)
            if sys.stderr.isatty():
                print(case.name, file=sys.stderr)
    Console(width=170).print(table(outcomes))
    return 1 if any(outcome.faults for outcome in outcomes) else 0


def table(outcomes: list[Outcome]) -> Table:
    made = Table(
        title=f"budget {BUDGET // MIB} MiB; resident memory may be {(BUDGET + ALLOWANCE) // MIB} MiB; "
        "turnaround of another job's block of (512, 512), median",
        caption="Share: the turnaround alone, while a program that asks nothing of the service takes one of "
        "two processors. The ratio to it is judged, beside the other, of the attack that works the workers "
        "as a job may.",
    )
    for name in (
        *("attack", "seen", "RSS before / peak", "turnaround alone / attacked", "ratio"),
        *("share", "ratio to share", "verdict"),
    ):
        made.add_column(name)
    for outcome in outcomes:
        made.add_row(
            outcome.case.name,
            ", ".join(f"{name} {count}" for name, count in sorted(outcome.saw.items())),
            f"{outcome.rss_before // MIB} / {outcome.rss_peak // MIB} MiB",
            f"{outcome.alone * 1e3:.0f} / {outcome.attacked * 1e3:.0f} ms ({outcome.samples})",
            f"{outcome.slowdown:.2f}",
            f"{outcome.fair_share * 1e3:.0f} ms",
            f"{outcome.slowdown_of_share:.2f}",
            "; ".join(outcome.faults) or "holds",
        )
    return made


if __name__ == "__main__":
    sys.exit(main())
