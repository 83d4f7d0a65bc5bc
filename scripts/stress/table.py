"""Counts as a Markdown table: a line for each kind or verb, a column for each outcome."""

from __future__ import annotations

from collections.abc import Sequence


def table(counts: dict[str, dict[str, int]], columns: Sequence[str], what: str) -> str:
    """counts: row -> outcome -> number; zeros are left empty. The last row has the sums."""
    total = {name: sum(row.get(name, 0) for row in counts.values()) for name in columns}
    rows = [*sorted(counts.items()), ("together", total)]
    lines = [f"| {what} | inputs | {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) + 1)]
    for name, row in rows:
        cells = [str(row.get(column) or "") for column in columns]
        lines.append(f"| {name} | {sum(row.get(c, 0) for c in columns)} | {' | '.join(cells)} |")
    return "\n".join(lines)
