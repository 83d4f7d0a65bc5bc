"""The papers side by side, from one run of compare_methods.py: what each brings against what its bytes bring anyway.

    python scripts/comparisons/one_run.py gains       # each paper beside what its bytes bring anyway, in few lines
    python scripts/comparisons/one_run.py papers      # methods, baselines in their bytes, an idea less, shuffled
    python scripts/comparisons/one_run.py evidence    # SVDQuant without data, by few calls, calibrated
    python scripts/comparisons/one_run.py verdicts    # controls that keep a gain; methods that do not gain

Reads scripts/results/methods-one-run-*.json and, for feature-FID, methods-fid-h200-*.json. The tables of the pages
are what this prints (a test holds them together). A row that the run did not reach is empty.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from one_run_rows import CONTROLS, EVIDENCE, GAINS, PAPERS
from scipy.stats import spearmanr

from ptq4dm.errors import run

RESULTS = Path(__file__).resolve().parents[1] / "results"
MODELS = {"unet-cifar10": "UNet", "dit-cifar10": "DiT"}
SAME_BYTES = 1.02  # a baseline's bytes are those of a method up to this factor
KEPT = 0.1  # of a gain: less than this has vanished
GAIN = 0.01  # of the error: less than this is no gain, and nothing can be kept of it


def rows_of(model: str, table: str = "one-run", folder: Path = RESULTS) -> dict[str, dict]:
    """Name -> row, of one model in one run."""
    path = folder / f"methods-{table}-{model}.json"
    return {row["row"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}


def markdown(groups: dict[str, tuple[str, ...]], fid: bool = False) -> str:
    """The rows in groups, both models beside each other; with fid, feature-FID and seconds of quantization, too."""
    runs = {model: (rows_of(model), rows_of(model, "fid-h200") if fid else {}) for model in MODELS}
    head = ["", "row"]
    for model in MODELS.values():
        head += [f"{model}: of float16", "PSNR (dB)", "ε error", *(["feature-FID", "s"] if fid else [])]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for group, names in groups.items():
        for place, name in enumerate(names):
            line = ["" if place else group, name]
            for rows, measured in runs.values():
                line += cells(rows.get(name), measured.get(name), fid)
            lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines)


def gains() -> str:
    """Each method beside its baseline, on both models: its share of the ε error, and how much more PSNR."""
    runs = {model: rows_of(model) for model in MODELS}
    head = ["", "row", "beside"]
    for model in MODELS.values():
        head += [f"{model}: ε error, of it", "PSNR, more (dB)"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for paper, pairs in GAINS.items():
        for place, (name, beside) in enumerate(pairs):
            line = ["" if place else paper, name, beside]
            for rows in runs.values():
                line += gain(rows.get(name), rows.get(beside))
            lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines)


def gain(row: dict | None, beside: dict | None) -> list[str]:
    """ε error over that of the row beside it, and PSNR less that; empty where either is no row."""
    if row is None or beside is None:
        return ["", ""]
    return [f"{row['eps_error'] / beside['eps_error']:.2f}", f"{row['psnr'] - beside['psnr']:+.1f}"]


def cells(row: dict | None, measured: dict | None, fid: bool) -> list[str]:
    """Bytes, PSNR with half of its 95 % interval, ε error, then feature-FID and seconds of a row; empty: no row."""
    if row is None:
        return [""] * (5 if fid else 3)
    low, high = row["psnr_interval"]
    figures = [
        f"{row['bytes_share']:.3f}",
        f"{row['psnr']:.2f} ± {(high - low) / 2:.2f}",
        f"{row['eps_error']:.2e}",
    ]
    if fid:
        figures += [f"{measured['feature_fid']:.2f}" if measured else "", f"{row['seconds_to_quantize']:.0f}"]
    return figures


def ranked(model: str) -> str:
    """A sentence: how the quantized rows with feature-FID rank by it, and by their paired errors."""
    rows = [row for row in rows_of(model, "fid-h200").values() if row.get("psnr") is not None]
    fid = [row["feature_fid"] for row in rows]
    psnr, error = (spearmanr(fid, [row[key] for row in rows]).statistic for key in ("psnr", "eps_error"))
    return (
        f"{MODELS[model]}: over {len(rows)} rows feature-FID has Spearman's rank correlation {psnr:.2f} with PSNR "
        f"and {error:.2f} with ε error."
    )


def verdicts(rows: dict[str, dict]) -> list[tuple[str, str, str]]:
    """What of one model's rows does not stand, as (row, what it is held against, share of the gain that is left).

    Methods that one of their baselines in their bytes equals, without a share; then controls that keep a gain.
    """
    found = []
    for row in rows.values():
        if row["kind"] == "method":
            better = [one for one in baselines(row, rows) if one["eps_error"] <= row["eps_error"]]
            found += [(row["row"], one["row"], "") for one in better]
    for (control, _, without), left in shares_left(rows).items():
        found += [(control, without, f"{100 * left:.0f} %")] if left is not None and left > KEPT else []
    return found


def shares_left(rows: dict[str, dict]) -> dict[tuple[str, str, str], float | None]:
    """Control -> what it keeps of the gain, as a share; None: there is no gain to keep. Of controls with all rows."""
    found: dict[tuple[str, str, str], float | None] = {}
    for names in CONTROLS:
        if all(name in rows for name in names):
            dealt, best, none = (rows[name]["eps_error"] for name in names)
            found[names] = (none - dealt) / (none - best) if none - best > GAIN * none else None
    return found


def counted(rows: dict[str, dict], model: str) -> str:
    """A sentence about all controls of a model."""
    left = list(shares_left(rows).values())
    kept, nothing = (sum(one is not None and one > KEPT for one in left), left.count(None))
    return (
        f"{model}: of {len(left)} controls {len(left) - kept - nothing} keep a tenth of the gain at most, "
        f"{kept} keep more, and {nothing} have no gain to keep."
    )


def baselines(method: dict, rows: dict[str, dict]) -> list[dict]:
    """A method's own baselines in its bytes or fewer."""
    most = method["bytes"] * SAME_BYTES
    own = [row for row in rows.values() if row["kind"] == "baseline" and row["of"] == method["row"]]
    return [row for row in own if row["bytes"] <= most]


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("table", choices=("gains", "papers", "evidence", "verdicts"))
    args = parser.parse_args(words)
    match args.table:
        case "gains":
            print(gains())
        case "papers":
            print(markdown(PAPERS))
        case "evidence":
            print(markdown(EVIDENCE, fid=True), "", *(ranked(model) for model in MODELS), sep="\n")
        case "verdicts":
            print("|  | row | ε error | beside | ε error | keeps of the gain |", "|---" * 6 + "|", sep="\n")
            for model, name in MODELS.items():
                rows = rows_of(model)
                for one, other, left in verdicts(rows):
                    errors = [f"{rows[row]['eps_error']:.2e}" for row in (one, other)]
                    print(f"| {name} | {one} | {errors[0]} | {other} | {errors[1]} | {left} |")
            print("", *(counted(rows_of(model), name) for model, name in MODELS.items()), sep="\n")


if __name__ == "__main__":
    run(main)
