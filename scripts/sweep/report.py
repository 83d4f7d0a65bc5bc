"""The tables of sweep/README.md, from the rows."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ptq4dm.errors import UserError
from ptq4dm.files.atomic import replacing

from .cells import FAILS, NOT_APPLICABLE, OK

BEGIN, END = "<!-- the tables: begin -->\n", "<!-- the tables: end -->\n"
NOUNS = {"class": "classes", "pipeline": "pipelines"}


def write(page: Path, rows: Iterable[dict[str, Any]], columns: Mapping[str, Mapping[str, str]]) -> None:
    """Put the tables between the marks of a page. columns: kind -> column -> what it is."""
    check(page)
    head, rest = page.read_text().split(BEGIN)
    rows = list(rows)
    parts = [tables(kind, [row for row in rows if row["kind"] == kind], columns[kind]) for kind in columns]
    with replacing(page) as temporary:
        temporary.write_text(head + BEGIN + "\n".join(part for part in parts if part) + END + rest.split(END)[1])


def check(page: Path) -> None:
    """Raises UserError unless the page is there and has the marks."""
    text = page.read_text() if page.is_file() else ""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise UserError(f"{page} must be a page with one line '{BEGIN.strip()}' and one '{END.strip()}'.")


def tables(kind: str, rows: list[dict[str, Any]], columns: Mapping[str, str]) -> str:
    """How many pass in each column, and by name those that do not."""
    if not rows:
        return ""
    noun, lines = NOUNS[kind], []
    cases = {(row["class"], row["variant"]) for row in rows}
    lines += [f"### {len({name for name, _ in cases})} {noun}, {len(cases)} configurations", "", conditions(rows), ""]
    lines += [
        f"| column | a cell passes when | {noun} | configurations | worst error | n/a |",
        "|---|---|---|---|---|---|",
    ]
    for column, what in columns.items():
        of_it = [row for row in rows if row["column"] == column]
        lines.append(f"| {column} | {what} | {shares(of_it)} | {worst(of_it)} | {count(of_it, NOT_APPLICABLE)} |")
    for result, title in ((FAILS, "Cells that fail"), (NOT_APPLICABLE, "Cells that float fails, too")):
        lines += ["", f"**{title}**", "", *named(rows, columns, result)]
    return "\n".join([*lines, ""])


def conditions(rows: list[dict[str, Any]]) -> str:
    """What the rows were made with."""
    commits = Counter(row["commit"] for row in rows)
    versions = {" ".join(item) for row in rows for item in row["versions"].items()}
    made = ", ".join(f"`{str(commit)[:9]}{'+' * str(commit).endswith('+')}`" for commit in commits)
    minutes = sum(row["seconds"] for row in rows) / 60
    seeds, backends = {row["seed"] for row in rows}, {row["backend"] for row in rows}
    return (
        f"Commit {made}; {', '.join(sorted(versions))}; seed {', '.join(map(str, sorted(seeds)))}; compiled by "
        f"{', '.join(sorted(backends))}; {minutes:.1f} minutes."
    )


def shares(rows: list[dict[str, Any]]) -> str:
    """ "passing of all" by classes (all configurations of a class must pass) and by configurations; n/a left out."""
    counted = [row for row in rows if row["result"] != NOT_APPLICABLE]
    classes: dict[str, bool] = defaultdict(lambda: True)
    for row in counted:
        classes[row["class"]] &= row["result"] == OK
    return f"{share(list(classes.values()))} | {share([row['result'] == OK for row in counted])}"


def share(passed: list[bool]) -> str:
    return f"{sum(passed)} of {len(passed)} ({100 * sum(passed) / len(passed):.0f} %)" if passed else "-"


def count(rows: list[dict[str, Any]], result: str) -> int:
    return sum(row["result"] == result for row in rows)


def worst(rows: list[dict[str, Any]]) -> str:
    """The largest error among passing cells."""
    passing = [row for row in rows if row["result"] == OK]
    errors = [value for row in passing for name, value in row["figures"].items() if name.endswith("error")]
    return f"{max(errors):.2g}" if errors else "-"


def named(rows: list[dict[str, Any]], columns: Mapping[str, str], result: str) -> list[str]:
    """The cells with a result, by column and reason: one line for all that have the same."""
    lines = []
    for column in columns:
        reasons: dict[str, list[str]] = defaultdict(list)
        for row in rows:
            if row["column"] == column and row["result"] == result:
                reason = (
                    row["reason"]
                    .replace(f"'{row['class']}'", row["class"])
                    .replace(row["class"], "the class")
                    .replace("a new the class", "a new model")
                    .replace("|", "\\|")
                )
                reasons[reason].append(row["class"] + f" ({row['variant']})" * bool(row["variant"]))
        lines += [f"- {column}: {reason}: {', '.join(names)}." for reason, names in reasons.items()]
    return lines or ["None."]
