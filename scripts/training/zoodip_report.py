"""The tables of compare_zoodip.py, by class: means over seeds, and shares of what back-propagation (BP) reaches."""

from __future__ import annotations

from collections import defaultdict
from statistics import fmean, stdev

from zoodip_arms import BACK, MEMORY, START, init_of

Groups = dict[tuple[str, str], list[dict]]  # rows of (model, arm)


def report(lines: list[dict]) -> str:
    """The tables of each class that rows are of."""
    classes: dict[str, list[dict]] = defaultdict(list)
    for line in lines:
        classes[line.get("settings", {}).get("class_name", "")].append(line)
    return "\n\n".join((f"class {name}\n\n" if name else "") + _tables(of) for name, of in classes.items())


def _tables(lines: list[dict]) -> str:
    """A Markdown table of rows with a loss, and one of memory and speed."""
    groups: Groups = defaultdict(list)
    for line in lines:
        groups[line["model"], line["arm"]].append(line)
    found = ["| model | arm | loss | share of BP's drop | least, in s.e. | accuracy | x start | steps/s | seeds |"]
    found += ["|---|---|---|---|---|---|---|---|---|"]
    found += [_line(*key, groups) for key in sorted(groups) if key[1] != MEMORY]
    if any(arm == MEMORY for _, arm in groups):
        found += ["", "| model | what | peak MB | of sampling's | BP in float32 takes | a second |"]
        found += ["|---|---|---|---|---|---|"]
    backs = {what: facts for row in groups["float32", MEMORY] for what, facts in _works(row).items()}
    for model, arm in sorted(groups):
        for row in groups[model, arm] if arm == MEMORY else ():
            found += _memory(model, _works(row), backs)
    changed = [line["row"] for line in lines if line.get("unchanged") is False]
    found += ["", f"model changed by tuning: {', '.join(changed) or 'none'}"]
    return "\n".join(found)


def _line(model: str, arm: str, groups: Groups) -> str:
    rows, init = groups[model, arm], init_of(arm)
    ceiling = [row["drop"] for row in groups.get(("float32", BACK + init), ())]
    starts = [row for row in groups.get((model, START + init), ()) if "accuracy" in row]
    # Where no sample was of the class, as if one had been.
    first = [max(row["accuracy"], 1 / row["settings"]["samples"]) for row in starts]
    start = fmean(first) if first else 0.0
    shares = [row["drop"] / fmean(ceiling) for row in rows] if ceiling else []
    share = f"{fmean(shares):.1%}" + (f" ± {stdev(shares):.1%}" if len(shares) > 1 else "") if shares else ""
    errors = [row["drop"] / row["drop_error"] for row in rows if row["drop_error"]]
    seen = [row["accuracy"] for row in rows if "accuracy" in row]
    cells = [model, arm, f"{fmean(row['loss'] for row in rows):.5f}", share]
    cells += [f"{min(errors):.1f}" if errors else "", f"{fmean(seen):.1%}" if seen else ""]
    cells += [f"{fmean(seen) / start:.1f}" if seen and start else ""]
    speeds = [row["steps_per_second"] for row in rows if "steps_per_second" in row]
    return "| " + " | ".join([*cells, f"{fmean(speeds):.1f}" if speeds else "", str(len(rows))]) + " |"


def _works(row: dict) -> dict[str, dict]:
    """{"one image: step": {"peak_bytes", "per_second"}, ...}"""
    return {what: facts for what, facts in row.items() if isinstance(facts, dict) and "peak_bytes" in facts}


def _memory(model: str, works: dict[str, dict], backs: dict[str, dict]) -> list[str]:
    found = []
    for what, facts in works.items():
        batch, peak = what.split(":")[0], facts["peak_bytes"]
        sampling, back = works.get(f"{batch}: sampling"), backs.get(f"{batch}: {BACK}")
        cells = [model, what, "" if peak is None else f"{peak / 1e6:.1f}"]
        cells.append(f"{peak / sampling['peak_bytes']:.2f}" if peak and sampling else "")
        cells.append(f"{back['peak_bytes'] / peak:.2f}x" if peak and back else "")
        found.append("| " + " | ".join([*cells, str(facts["per_second"])]) + " |")
    return found
