"""What a rotated input costs: quantized Linear layers with and without it, beside bf16; rows of JSON, resumable.

    python scripts/benchmarks/bench_rotation.py [--rows 4096 64] [--shapes N,K ...] [--groups 16 64 256]
        [--output out/rotation.json]

    bf16      F.linear, which is cuBLAS (float32 on a CPU)
    plain     the quantized layer
    rotated   the layer with a rotated input; on a GPU rotation and rounding are one kernel
    apart     the rotation as a product of torch, then the quantized layer: what the kernel saves
    codes     the kernel that quantizes, alone, without and with the rotation (on a GPU)

The candidates of a shape take turns in one run, on a GPU in CUDA graphs; a row has their microseconds and ratios, and
the error of the rotated layer against the same layer on the CPU. Rows that the output holds are not made again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from bench_cpu_w4 import medians
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "comparisons"))
from conditions import made_on  # noqa: E402

from ptq4dm.errors import run  # noqa: E402
from ptq4dm.files.rows import Rows  # noqa: E402
from ptq4dm.kernels.formats.rotation import groups_of, rotate  # noqa: E402
from ptq4dm.kernels.w4 import from_codes  # noqa: E402
from ptq4dm.layers.plan import Int4Plan, LayerPlan  # noqa: E402
from ptq4dm.layers.progressive import ProgressivePlan  # noqa: E402
from ptq4dm.layers.registry import quantized_copy  # noqa: E402
from ptq4dm.layers.rotated.choices import ROTATED  # noqa: E402
from ptq4dm.pipelines.devices import check_device  # noqa: E402
from ptq4dm.svdquant.layers.plan import SVDQPlan  # noqa: E402

SHAPES = ["3072,3072", "12288,3072", "3072,12288"]  # of FLUX's blocks
PLANS = {
    "int8": LayerPlan(),
    "fp8": LayerPlan("fp8"),
    "int4 g64": Int4Plan(group_size=64),
    "progressive": ProgressivePlan(group_size=128),
    "svdq A8": SVDQPlan(rank=32, activation="fp8", evidence="none", rounding="nearest"),
    "svdq A4": SVDQPlan(rank=32, activation="int4", evidence="none", rounding="nearest"),
}
MODES = {"int8": "int8", "fp8": "fp8", "svdq A8": "fp8", "svdq A4": "int4"}


@torch.no_grad()
def measure(label: str, rows: int, n: int, k: int, group: int, device: torch.device, rounds: int) -> dict:
    """Microseconds of the candidates, and the error of the rotated layer."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    linear, plan = nn.Linear(k, n).to(dtype), PLANS[label]
    kind = "regular" if group in groups_of("regular") else "sylvester"
    x = torch.randn(rows, k).to(dtype)
    plain = quantized_copy(linear, plan, label)
    turned = quantized_copy(linear, ROTATED[type(plan)](plan, group, kind), label)
    due = turned(x[:64].float())
    linear, plain, turned, x = (one.to(device) for one in (linear, plain, turned, x))

    def apart(x: Tensor) -> Tensor:
        return plain(rotate(x, group, kind))

    candidates = {"bf16": linear, "plain": plain, "rotated": turned, "apart": apart}
    calls = {name: (lambda one=one: one(x)) for name, one in candidates.items()}
    if device.type == "cuda" and label in MODES:
        smooth = getattr(plain, "smooth", None)
        for name, turn in (("codes", (0, kind)), ("codes rotated", (group, kind))):
            after = (None, smooth, None, MODES[label], 0.0, None, None, 0.0, "adaptive", "", *turn)
            calls[name] = lambda after=after: from_codes.svdq_codes(x, *after)
    times = race(calls, device, rounds)
    error = float((turned(x[:64]).float().cpu() - due).norm() / due.norm())
    ratios = {f"{name}_over_plain": times[name] / times["plain"] for name in ("bf16", "rotated", "apart")}
    return {"microseconds": times, **ratios, "error": error, "kernels": turned.kernels_text()}


def race(calls: dict, device: torch.device, rounds: int) -> dict[str, float]:
    if device.type != "cuda":
        return {name: 1e3 * value for name, value in medians(calls).items()}
    from ptq4dm.kernels.tuning import stopwatch  # it is of Triton

    return stopwatch.race({name: [call] for name, call in calls.items()}, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, nargs="+", default=[4096, 64])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="N,K", help="outputs, inputs")
    parser.add_argument("--groups", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--layers", nargs="+", choices=list(PLANS), default=list(PLANS))
    parser.add_argument("--rounds", type=int, default=11, help="on a GPU; on a CPU as many as take a moment")
    parser.add_argument("--output", type=Path, default=Path("out/rotation.json"))
    args = parser.parse_args()
    device = check_device(args.device)
    results = Rows(args.output, {"device": device.type, "rounds": args.rounds})
    done = {(row["layer"], row["rows"], row["shape"], row["group"]) for row in results}
    for shape in args.shapes:
        n, k = map(int, shape.split(","))
        for key in [(label, m, shape, group) for label in args.layers for m in args.rows for group in args.groups]:
            if key in done:
                continue
            label, m, _, group = key
            found = measure(label, m, n, k, group, device, args.rounds)
            results.add({"layer": label, "rows": m, "shape": shape, "group": group, **found, **made_on(args.device)})
            print(*key, {name: round(value, 1) for name, value in found["microseconds"].items()}, flush=True)


if __name__ == "__main__":
    run(main)
