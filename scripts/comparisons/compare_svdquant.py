"""What each part of SVDQuant is worth, and what it costs in bytes: the tables of scripts/results/README.md.

    python scripts/comparisons/compare_svdquant.py --output out/svdquant.json  # the parts, on dit-cifar10
    python scripts/comparisons/compare_svdquant.py --table bytes --output out/svdquant.json  # error against bytes
    python scripts/comparisons/compare_svdquant.py --model unet-cifar10 --whole --table mixed --output out/mixed.json
    python scripts/comparisons/compare_svdquant.py --num-fid 10000 --device cuda ...  # with feature-FID, on a GPU

Attention and feed-forward layers are quantized; all else stays as it is, except with --whole. Columns: PSNR of
same-seed images (--num-paired seeds, --steps DDIM steps) and noise prediction error, both against full precision, on
seeds that calibration never saw; stored bytes against float16; feature-FID. Rows in the output are not made again.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import torch
from conditions import bytes_of_float16, tensor_float32
from paired import Paired

import ptq4dm
from ptq4dm.calibration.plot import pyplot, save_figure
from ptq4dm.errors import run
from ptq4dm.files.rows import Rows
from ptq4dm.progress import progress_bar

SETTINGS = ("model", "whole", "steps", "num_paired", "num_fid", "fid_steps", "calibration_samples")
ELSEWHERE = {"*norm*": "keep"}  # adaLN and its embeddings


def parts() -> list[tuple[str, dict]]:
    """RTN, smoothing only, branch only, SVDQuant at several ranks; W4A4 and W4A8; both roundings; the full search."""
    rows: list[tuple[str, dict]] = [("full precision", {})]
    for activations in ("int4", "int8"):
        for rounding in ("gptq", "nearest"):
            one = {"activations": activations, "rounding": rounding}
            rows.append(("RTN", {**one, "rank": 0, "smoothing": "none"}))
            rows.append(("smoothing only", {**one, "rank": 0}))
            rows.append(("low rank only", {**one, "smoothing": "none"}))
            rows += [("SVDQuant", {**one, "rank": rank}) for rank in (16, 32, 64)]
        rows.append(("SVDQuant", {"activations": activations, "rounding": "gptq", "smoothing": "exhaustive"}))
    return rows


def sizes() -> list[tuple[str, dict]]:
    """Error against bytes: ranks at group 64, and rounding alone in smaller groups."""
    rows = []
    for activations in ("int4", "int8"):
        rows += [("SVDQuant", {"activations": activations, "rank": rank}) for rank in (0, 4, 8, 16, 32, 64)]
        plain = {"activations": activations, "rank": 0, "smoothing": "none", "rounding": "nearest"}
        rows += [("RTN", {**plain, "group_size": size}) for size in (64, 32, 16)]
    return [*rows, ("RTN W8A8", {})]


def mixed() -> list[tuple[str, dict]]:
    """Whole models, convolutions in 8 bits: what 4-bit weights in the matrix products cost and save."""
    rtn = {"activations": "int8", "rank": 0, "smoothing": "none", "rounding": "nearest"}
    return [("full precision", {}), ("PTQ4DM W8A8", {}), ("RTN", rtn), ("SVDQuant", {"activations": "int8"})]


TABLES = {"parts": parts, "bytes": sizes, "mixed": mixed}


class Bench:
    """The model, its calibration and its truth, each made once."""

    def __init__(self, args):
        self.args, steps = args, args.steps
        self.pipe = ptq4dm.load_reference(args.model, device=args.device)
        self.store = ptq4dm.collect(
            self.pipe, ptq4dm.CalibrationConfig("solver", args.calibration_samples, steps, batch_size=args.batch_size)
        )
        self.pipe.scheduler.set_timesteps(steps)
        grid = self.pipe.scheduler.timesteps.tolist()
        times = [grid[i % len(grid)] for i in range(args.num_paired)]
        self.truth = Paired(self.pipe, args.num_paired, times, steps, args.batch_size)

    def measure(self, name: str, options: dict) -> dict:
        args, exact = self.args, self.truth.exact
        cuda = args.device.startswith("cuda")
        row = {"method": name, "options": options, "device": torch.cuda.get_device_name() if cuda else "CPU"}
        model, start = copy.deepcopy(exact), time.time()
        if name != "full precision":
            report = ptq4dm.quantize(model, self._config(name, options), self.store)
            row["seconds_to_quantize"] = round(time.time() - start, 1)
            row |= self.truth.compare(model)
            row["bytes_float16"] = bytes_of_float16(model) / bytes_of_float16(exact)
            row["kernels"] = sorted({layer["kernel"] for layer in report.layers})
        if args.num_fid:
            if cuda:
                model.compile(dynamic=False)  # in place
            with tensor_float32(cuda):
                row["feature_fid"] = self.truth.feature_fid(model, args.num_fid, args.fid_steps)
        return row

    def _config(self, name: str, options: dict) -> ptq4dm.QuantConfig:
        kept = {} if self.args.whole else ELSEWHERE
        if name == "RTN W8A8":
            return ptq4dm.RTNConfig(modules_to_not_convert=list(kept))
        if name == "PTQ4DM W8A8":
            return ptq4dm.PTQ4DMConfig(modules_to_not_convert=list(kept))
        return ptq4dm.SVDQuantConfig(roles=kept, **options)


def markdown(rows: list[dict]) -> str:
    lines = ["| | A | rounding | rank | group | PSNR (dB) | ε error | bytes | feature-FID |", "|---" * 9 + "|"]
    defaults = {"activations": "int4", "rounding": "gptq", "rank": 32, "group_size": 64, "smoothing": "search"}
    for row in rows:
        o = {**defaults, **row["options"]}
        choices = [o["activations"], o["rounding"], o["rank"], o["group_size"]] if row["options"] else [""] * 4
        name = row["method"] + (", exhaustive search" if o["smoothing"] == "exhaustive" else "")
        figures = [
            f"{row[key]:{form}}" if key in row else ""
            for key, form in (("psnr", ".2f"), ("eps_error", ".1e"), ("bytes_float16", ".3f"), ("feature_fid", ".2f"))
        ]
        lines.append("| " + " | ".join(str(cell) for cell in (name, *choices, *figures)) + " |")
    return "\n".join(lines)


def draw(rows: list[dict], path: Path) -> None:
    """Noise prediction error against stored bytes, a line per method and activations."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7, 4))
    lines: dict[str, list] = {}
    for row in rows:
        activations = row["options"].get("activations")
        name = row["method"] + (f" W4A{activations[3:]}" if activations else "")
        lines.setdefault(name, []).append((row["bytes_float16"], row["eps_error"]))
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), "o-" if name.startswith("SVDQuant") else "x--", label=name)
    axes.set(xlabel="stored bytes / those of float16", ylabel="noise prediction error", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_figure(figure, path)
    print(f"picture: {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="dit-cifar10")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--table", choices=TABLES, default="parts")
    parser.add_argument(
        "--whole", action="store_true", help="quantize all that the method would, not only the blocks"
    )
    parser.add_argument("--steps", type=int, default=20, help="DDIM steps")
    parser.add_argument("--num-paired", type=int, default=16)
    parser.add_argument("--num-fid", type=int, default=0, help="images for feature-FID")
    parser.add_argument("--fid-steps", type=int, default=50, help="their DDIM steps")
    parser.add_argument("--calibration-samples", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th row from the i-th")
    parser.add_argument("--output", type=Path, default=Path("out/svdquant.json"))
    args = parser.parse_args()
    results = Rows(args.output, {name: getattr(args, name) for name in SETTINGS})
    index, count = (int(part) for part in args.shard.split("/"))
    asked = TABLES[args.table]()[index::count]
    done = [(row["method"], row["options"]) for row in results]
    todo = [row for row in asked if row not in done]
    bench = Bench(args) if todo else None
    for name, options in progress_bar(todo, desc=args.model, unit="row"):
        results.add(bench.measure(name, options))
    rows = [row for row in results if (row["method"], row["options"]) in asked]
    print(markdown(rows))
    if args.table == "bytes":
        draw(rows, args.output.with_suffix(".png"))


if __name__ == "__main__":
    run(main)
