"""The papers side by side, from one run of compare_methods.py: what each brings against what its bytes bring anyway.

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

from ptq4dm.errors import run

RESULTS = Path(__file__).resolve().parents[1] / "results"
MODELS = {"unet-cifar10": "UNet", "dit-cifar10": "DiT"}
SAME_BYTES = 1.02  # a baseline's bytes are those of a method up to this factor
KEPT = 0.1  # of a gain: less than this has vanished
GAIN = 0.01  # of the error: less than this is no gain, and nothing can be kept of it
OHQ = "OHQ W8A8 and W4A8 g64 RTN, bytes 0.385"
SHARES = "MixLLM W4.4A8 g128"
TRAINED = "GradPTQ W4A8 per row, dynamic"
PAPERS = {
    "PTQ4DM": ("PTQ4DM W8A8", "RTN W8A8", "PTQ4DM W8A8, mse ranges", "PTQ4DM W8A8, ranges shuffled"),
    "PTQ4DM with Hessian rounding": (
        "PTQ4DM W4A8 per row, gptq", "RTN W4A8 per row", "PTQ4DM W4A8 per row",
        "PTQ4DM W4A8 per row, gptq, Hessian shuffled",
    ),
    "SVDQuant": (
        "SVDQuant W4A8", "RTN in the bytes of SVDQuant W4A8", "SVDQuant W4A8, no branch", "SVDQuant W4A8, nearest",
        "SVDQuant W4A8, nearest, branch at random", "SVDQuant W4A4", "RTN in the bytes of SVDQuant W4A4",
        "SVDQuant W4A4, no branch", "SVDQuant W4A4, nearest", "SVDQuant W4A4, nearest, branch at random",
    ),
    "GradPTQ": tuple(
        what.format(TRAINED)
        for what in (
            "{}", "gptq as {}", "nearest as {}", "{}, begun at nearest", "{}, each layer by itself",
            "{}, flips at random",
        )
    ),
    "PD-Quant": tuple(
        f"PD-Quant W{bits}{what}"
        for bits in ("4A4", "8A8")
        for what in ("", ", mse ranges", ", lp ranges", ", of other tuples")
    ),
    "QoQ": (
        "QoQ W4A8 g128", "QoQ W4A8 g128, every pass off", "QoQ W4A8 g128, no rotation",
        "QoQ W4A8 g128, Hessian shuffled", "QoQ W4A8 g128, divisors shuffled",
    ),
    "MixPE": ("MixPE W4A8 g128", "RTN W4A8 g128, dynamic", "MixPE W4A8 g128, zero points shuffled"),
    "MixLLM": tuple(
        f"{SHARES}, {rounding}{what}"
        for rounding in ("nearest", "gptq")
        for what in ("", ", rows=0, g32", ", in each layer", ", permuted in each layer")
    ),
    "LUT-GEMM": tuple(
        f"LUT-GEMM q{bits} g128{what}"
        for bits in (2, 3)
        for what in ("", ", uniform g128", ", not refitted", ", nearest, scales shuffled")
    ),
    "SplitQuant": (
        "SplitQuant W2", "RTN W4A8 per row, all layers", "SplitQuant W2, clusters at random",
        "PTQ4DM W8A6, inputs split", "PTQ4DM W8A6, inputs split, parts at random",
    ),
    "OHQ": (
        OHQ, "RTN W8A8, dynamic", "RTN W4A8 g64, dynamic", f"{OHQ}, direct", f"{OHQ}, sensitivities permuted",
    ),
}  # fmt: skip
"""Paper -> its rows: the method, its baseline, what is left without an idea, and dealt out at random."""

EVIDENCE = {
    f"W4A{bits}": (
        f"RTN as SVDQuant W4A{bits}", f"RTN in the bytes of SVDQuant W4A{bits}", f"Hadamard W4A{bits}",
        f"Hadamard W4A{bits}, gptq",
        *(("Codebook W4A8 g64, gptq", "Codebook W4A8 g64, gptq, hadamard") if bits == 8 else ()),
        *(f"SVDQuant W4A{bits}{what}" for what in (
            ", no data", ", no data, hadamard:64", ", 4 calls", ", 20 calls", "", ", nearest", ", no branch",
            ", no smoothing", ", hadamard:64", ", branch of inputs", ", branch of inputs, hadamard:64",
        )),
    )
    for bits in (8, 4)
}  # fmt: skip
"""Bits -> rows of what SVDQuant looks at, and of what it is compared with."""

CONTROLS = (
    *((f"PTQ4DM {bits}, ranges shuffled", f"PTQ4DM {bits}", f"RTN {bits}") for bits in ("W8A8", "W6A6")),
    *(
        (f"PTQ4DM {form}, gptq, {how}", f"PTQ4DM {form}, gptq", f"PTQ4DM {form}")
        for form in ("W8A8", "W4A8 per row", "W4A8 g64", "W4A8 g64 affine")
        for how in ("Hessian shuffled", "flips at random")
    ),
    *(
        (f"PTQ4DM W4.5A8 rows, {one}, shuffled in each layer", f"PTQ4DM W4.5A8 rows, {one}",
         f"PTQ4DM W4.5A8 rows, {one}, by random")
        for one in ("nearest", "gptq")
    ),
    *(
        (f"SVDQuant W4A{bits}, nearest, {how}", f"SVDQuant W4A{bits}, nearest",
         f"SVDQuant W4A{bits}, nearest, {none}")
        for bits in (8, 4)
        for how, none in (("branch at random", "no branch"), ("smoothing shuffled", "no smoothing"))
    ),
    *(
        (f"SVDQuant W4A{bits}, no data, branch at random", f"SVDQuant W4A{bits}, no data, one turn",
         f"SVDQuant W4A{bits}, no data, no branch")
        for bits in (8, 4)
    ),
    *(
        (f"QoQ W4A8 g128, {how}", "QoQ W4A8 g128", f"QoQ W4A8 g128, {none}")
        for how, none in (
            ("Hessian shuffled", "nearest"), ("flips at random", "nearest"), ("rotations shuffled", "no rotation"),
            ("divisors shuffled", "no smoothing"), ("order shuffled", "no reorder"),
        )
    ),
    ("MixPE W4A8 g128, zero points shuffled", "MixPE W4A8 g128", "RTN W4A8 g128, dynamic"),
    *(
        (f"{SHARES}, {one}, permuted in each layer", f"{SHARES}, {one}", f"{SHARES}, {one}, {none}")
        for one, none in (("nearest", "rows=0"), ("gptq", "rows=0"))
    ),
    *(
        (f"{name}, parts at random", name, f"{name}, inputs whole")
        for name in (f"PTQ4DM {form}, inputs split" for form in ("W8A8", "W8A6", "W8A4", "W4A6 per row", "W4A6 g128"))
    ),
    ("SplitQuant W2, clusters at random", "SplitQuant W2", "SplitQuant W2, one cluster"),
    *(
        (f"{name}, sensitivities permuted", name, f"{name}, formats at random")
        for name in (OHQ, OHQ.replace("RTN", "gptq"))
    ),
    *(
        (f"Codebook W4A8 g64, gptq, {how}", "Codebook W4A8 g64, gptq", "Codebook W4A8 g64")
        for how in ("Hessian shuffled", "flips at random")
    ),
    (f"{TRAINED}, flips at random", TRAINED, f"nearest as {TRAINED}"),
    *(
        (f"PD-Quant {bits}, of other tuples", f"PD-Quant {bits}", f"PD-Quant {bits}, mse ranges")
        for bits in ("W4A4", "W8A8")
    ),
)  # fmt: skip
"""Controls: (dealt out at random, as the method decides, without what is decided)."""


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


def verdicts(rows: dict[str, dict]) -> list[tuple[str, str, str]]:
    """What of one model's rows does not stand, as (row, what it is held against, share of the gain that is left).

    Methods that one of their baselines in their bytes equals, without a share; then controls that keep a gain.
    """
    found = []
    for row in rows.values():
        if row["kind"] == "method":
            better = [one for one in baselines(row, rows) if one["eps_error"] <= row["eps_error"]]
            found += [(row["row"], one["row"], "") for one in better]
    for control, whole, without in CONTROLS:
        if all(name in rows for name in (control, whole, without)):
            dealt, best, none = (rows[name]["eps_error"] for name in (control, whole, without))
            left = (none - dealt) / (none - best) if none - best > GAIN * none else 0.0
            found += [(control, without, f"{100 * left:.0f} %")] if left > KEPT else []
    return sorted(found, key=lambda one: one[2] != "")


def baselines(method: dict, rows: dict[str, dict]) -> list[dict]:
    """A method's own baselines in its bytes or fewer."""
    most = method["bytes"] * SAME_BYTES
    own = [row for row in rows.values() if row["kind"] == "baseline" and row["of"] == method["row"]]
    return [row for row in own if row["bytes"] <= most]


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("table", choices=("papers", "evidence", "verdicts"))
    args = parser.parse_args(words)
    if args.table == "verdicts":
        print("|  | row | ε error | beside | ε error | keeps of the gain |", "|---" * 6 + "|", sep="\n")
        for model, name in MODELS.items():
            rows = rows_of(model)
            for one, other, left in verdicts(rows):
                errors = [f"{rows[row]['eps_error']:.2e}" for row in (one, other)]
                print(f"| {name} | {one} | {errors[0]} | {other} | {errors[1]} | {left} |")
    else:
        print(markdown(PAPERS) if args.table == "papers" else markdown(EVIDENCE, fid=True))


if __name__ == "__main__":
    run(main)
