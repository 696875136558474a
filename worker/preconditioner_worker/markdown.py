"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

Cells = Sequence[str]


def table(header: Cells, rows: Sequence[Cells]) -> list[str]:
    """The lines of a table, and an empty one after it."""
    lines = [_line(header), _line(["---"] * len(header))]
    return [*lines, *(_line(row) for row in rows), ""]


def _line(cells: Cells) -> str:
    return f"| {' | '.join(cells)} |"
