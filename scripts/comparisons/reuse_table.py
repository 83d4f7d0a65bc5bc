"""The table of steps that reuse a deep part on a GPU: of each model a line for a way, as the page has it.

    python scripts/comparisons/reuse_table.py

Reads scripts/results/reuse-*-h200-depth-0.json (`compare_reuse.py`). A cell is time / PSNR / feature-FID, the last
bold where a plan's is below that of fewer evaluations in the same time, on a straight line between those measured.
"""

from __future__ import annotations

from pathlib import Path

from compare_reuse import in_the_same_time

from ptq4dm.files.outside import read_json

RESULTS = Path(__file__).resolve().parents[1] / "results"
MODELS = {
    "unet-cifar10": "UNet",
    "dit-cifar10": "DiT",
    "flow-dit-cifar10": "flow DiT",
    "unet-cifar10-w8a8": "UNet W8A8",
    "dit-cifar10-w8a8": "DiT W8A8",
}
WAYS = {
    "planned, history 3, depth 0": "planned",
    "evenly, depth 0": "spread evenly",
    "3 at random, depth 0": "at random, median of 3",
    "fewer evaluations": "fewer evaluations",
    "full": "",
}
COMPUTED = (8, 10, 12, 14, 16, 20)


def rows_of(model: str) -> list[dict]:
    """What was measured of a model, as `compare_reuse.py` wrote it."""
    return read_json(RESULTS / f"reuse-{model}-h200-depth-0.json")["rows"]


def lines(model: str) -> list[str]:
    """A line for a way; all evaluations stand at the end of the line of fewer."""
    rows = rows_of(model)
    found: dict[str, dict[int, str]] = {}
    for row in rows:
        way = "fewer evaluations" if row["way"] == "full" else WAYS[row["way"]]
        other, fid = in_the_same_time(row, rows, "feature_fid"), f"{row['feature_fid']:.3f}"
        better = way == "planned" and other is not None and row["feature_fid"] < other
        fid = f"**{fid}**" if better else fid
        psnr = "" if row["way"] == "full" else f"{row['psnr']:.1f} / "
        found.setdefault(way, {})[row["computed"]] = f"{row['time']:.2f} / {psnr}{fid}"
    heads = [MODELS[model], *[""] * (len(found) - 1)]
    order = sorted(found, key=list(WAYS.values()).index)
    return [
        "| " + " | ".join([head, way, *(found[way].get(n, "") for n in COMPUTED)]) + " |"
        for head, way in zip(heads, order, strict=True)
    ]


def main() -> None:
    print("| | computed | " + " | ".join(map(str, COMPUTED)) + " |", "|---" * (len(COMPUTED) + 2) + "|", sep="\n")
    for model in MODELS:
        print(*lines(model), sep="\n")


if __name__ == "__main__":
    main()
