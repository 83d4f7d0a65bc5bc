"""Tables of text whose columns are as wide as what stands in them."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Lines of rows of as many cells each; the last cell is as long as it is. right: columns aligned at their end."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    return ["  ".join([*(_cell(row[i], widths[i], i in right) for i in range(len(widths))), row[-1]]) for row in rows]


def _cell(text: str, width: int, right: bool) -> str:
    return text.rjust(width) if right else text.ljust(width)
