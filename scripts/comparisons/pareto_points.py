"""The points of the picture of all methods: error, stored bytes and step time of each row in scripts/results."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[1] / "results"
LEFT_OUT = ("methods-fid-", "methods-times-")  # older rows with feature-FID; rows whose times alone count
FIRST = "methods-one-run-"  # whose rows stand where other runs have them, too
ENDS = {"W8A8 dynamic", "W8A8 static"}  # of the first and the last layer beside another format
UNIFORM = {
    "rtn activations=dynamic": "W8A8 dynamic",
    "rtn weight_bits=4 activations=dynamic": "W4A8 dynamic",
    "rtn weight_bits=4 group_size=128 activations=dynamic": "W4A8 g128 dynamic",
    "rtn weight_bits=4 group_size=64 activations=dynamic": "W4A8 g64 dynamic",
}
"""OHQ's candidates -> what reports call their format."""


@dataclass(frozen=True)
class Point:
    """One row. method: as registered. kind: of the table's rows. error: of the noise prediction, relative, squared.

    bytes: of float16's. time: of a step in full precision on the same device, None where it was not measured.
    simulated: its arithmetic is, no kernel computes it. device: that the time is of.
    """

    name: str
    method: str
    kind: str
    error: float
    bytes: float
    time: float | None = None
    simulated: bool = False
    device: str = ""


def files_of(model: str, folder: Path = RESULTS) -> dict[str, list[Path]]:
    """ "rows", "times" and "ohq": the files that a model's points are read from; one of rows may hold two models.

    Of rows with one name the first file's counts: the one run's, then by the names of files.
    """
    tables = [path for path in sorted(folder.glob("methods-*.json")) if not path.name.startswith(LEFT_OUT)]
    tables.sort(key=lambda path: not path.name.startswith(FIRST))
    short = model.partition("-")[0]
    return {
        "rows": [path for path in tables if any(row["model"] == model for row in _read(path)["rows"])],
        "times": sorted(folder.glob(f"methods-times-*{model}.json")),
        "ohq": [path for path in sorted(folder.glob("ohq-*.json")) if short in path.stem.split("-")],
    }


def points_of(model: str, folder: Path = RESULTS) -> list[Point]:
    """All points of a model: rows of the tables, each name once, then what OHQ's comparisons measured."""
    files = files_of(model, folder)
    comparisons = {path: _read(path) for path in files["ohq"]}
    times = Times([_read(path)["rows"] for path in files["times"]], list(comparisons.values()))
    tables = [[row for row in _read(path)["rows"] if row["model"] == model] for path in files["rows"]]
    rows = [row for table in tables for row in table if row.get("eps_error")]
    found: dict[str, Point] = {}
    for row, share in zip(rows, shares(rows), strict=True):
        if row["row"] not in found:
            time, device = times.of(row)
            found[row["row"]] = Point(
                row["row"],
                row["recipe"]["method"],
                row["kind"],
                row["eps_error"],
                share,
                time,
                row["simulated"],
                device,
            )
    return [*found.values(), *(point for facts in comparisons.values() for point in of_ohq(facts))]


def shares(rows: list[dict]) -> list[float]:
    """Bytes over those of float16, without what older rows of the same model count beyond: tables in no file."""
    whole = [row["bytes"] / row["bytes_share"] for row in rows]
    least = min(whole, default=0.0)
    return [
        (row["bytes"] - (own - least)) / least if own - least > 1 else row["bytes_share"]
        for row, own in zip(rows, whole, strict=True)
    ]


class Times:
    """Measured step times: by a row's name, or by the formats of its layers, for these decide about a step's time."""

    def __init__(self, tables: list[list[dict]], comparisons: list[dict]):
        timed = [row for rows in tables for row in rows if (row.get("step_time") or {}).get("ratio")]
        self.names = {row["row"]: (row["step_time"]["ratio"], row["device"]) for row in timed}
        self.formats = {str(row["formats"]): self.names[row["row"]] for row in timed}
        self.uniform: dict[str, tuple[float, str]] = {}
        for facts in comparisons:
            if on_cpu(facts):
                for label, one in facts["uniform"].items():
                    if label in UNIFORM:
                        self.uniform[UNIFORM[label]] = one["measured_latency"], facts["device"]

    def of(self, row: dict) -> tuple[float | None, str]:
        """(share of the step in full precision, device) of a row; None and nothing where it was not measured."""
        formats = row["formats"]
        known = self.names.get(row["row"]) or self.formats.get(str(formats))
        if known is None:
            own = set(formats) - ENDS or set(formats)
            known = self.uniform.get(next(iter(own))) if len(own) == 1 else None
        return known or (None, "")


def on_cpu(facts: dict) -> bool:
    """Whether a comparison's steps were timed on a CPU: its device tells threads."""
    return facts["device"].endswith("threads")


def of_ohq(facts: dict) -> list[Point]:
    """The choices of one comparison, and along its fronts, where these were measured."""
    timed = {one.get("plan"): one["measured"] for one in facts["times"]} if on_cpu(facts) else {}
    where = facts["device"] if timed else ""
    found = []
    for way, at in facts["budget"].items():
        size, time = at["bytes"]["chosen"], timed.get(f"chosen, {way}")
        name = "OHQ" if way == "masked, weights" else f"OHQ, {way}"
        found.append(Point(name, "ohq", "method", at["error"]["chosen"], size, time, device=where))
    for one in facts.get("fronts", []):
        time = timed.get(f"front of {one['budget']}, {one['of']:.4f}")
        if one["error"]:
            name = f"OHQ, {one['budget']} {one['of']:.2f}"
            found.append(Point(name, "ohq", "method", one["error"], one["bytes"], time, device=where))
    return found


def front(points: list[tuple[Point, float]]) -> list[tuple[Point, float]]:
    """Points, each with its cost, that no other beats or equals in cost and error, by cost."""
    best: list[tuple[Point, float]] = []
    for point, cost in sorted(points, key=lambda pair: (pair[1], pair[0].error)):
        if not best or point.error < best[-1][0].error:
            best.append((point, cost))
    return best


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))
