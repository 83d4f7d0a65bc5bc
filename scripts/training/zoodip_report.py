"""The table of compare_zoodip.py: means over seeds, as shares of what back-propagation (BP) in float32 reaches."""

from __future__ import annotations

from collections import defaultdict
from statistics import fmean, stdev

BACK = "back-propagation"


def report(lines: list[dict]) -> str:
    """A Markdown table of rows with a loss, and one of memory and speed."""
    groups: dict[tuple[str, str], list[dict]] = defaultdict(list)
    for line in lines:
        groups[line["model"], line["arm"]].append(line)
    ceiling = [line["drop"] for line in groups["float32", BACK]]
    found = ["| model | arm | loss | share of BP's drop | least, in s.e. | accuracy | x start | steps/s | seeds |"]
    found += ["|---|---|---|---|---|---|---|---|---|"]
    for (model, arm), rows in sorted(groups.items()):
        if arm != "memory" and rows:
            starts = [row for row in groups[model, "start"] if "accuracy" in row]
            # Where no sample was of the class, as if one had been.
            first = [max(row["accuracy"], 1 / row["settings"]["samples"]) for row in starts]
            start = fmean(first) if first else 0.0
            found.append(_line(model, arm, rows, ceiling, start))
    found += ["", "| model | what | peak MB | a second |", "|---|---|---|---|"]
    for (model, arm), rows in sorted(groups.items()):
        for row in rows if arm == "memory" else ():
            for what, facts in row.items():
                if isinstance(facts, dict) and "peak_bytes" in facts:
                    peak = "" if facts["peak_bytes"] is None else f"{facts['peak_bytes'] / 1e6:.1f}"
                    found.append(f"| {model} | {what} | {peak} | {facts['per_second']} |")
    changed = [line["row"] for line in lines if line.get("unchanged") is False]
    found += ["", f"model changed by tuning: {', '.join(changed) or 'none'}"]
    return "\n".join(found)


def _line(model: str, arm: str, rows: list[dict], ceiling: list[float], start: float) -> str:
    shares = [row["drop"] / fmean(ceiling) for row in rows] if ceiling else []
    share = f"{fmean(shares):.1%}" + (f" ± {stdev(shares):.1%}" if len(shares) > 1 else "") if shares else ""
    errors = [row["drop"] / row["drop_error"] for row in rows if row["drop_error"]]
    seen = [row["accuracy"] for row in rows if "accuracy" in row]
    cells = [model, arm, f"{fmean(row['loss'] for row in rows):.5f}", share]
    cells += [f"{min(errors):.1f}" if errors else "", f"{fmean(seen):.1%}" if seen else ""]
    cells += [f"{fmean(seen) / start:.1f}" if seen and start else ""]
    speeds = [row["steps_per_second"] for row in rows if "steps_per_second" in row]
    return "| " + " | ".join([*cells, f"{fmean(speeds):.1f}" if speeds else "", str(len(rows))]) + " |"
