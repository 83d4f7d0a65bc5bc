"""Linear layers with 4-bit weights on a CPU: the compiled kernel against what else there is, in one run.

    python scripts/benchmarks/bench_cpu_w4.py [--threads 1] [--shapes N,K ...] [--rows 1 16 256 1024] [--json FILE]

Each call takes float32 rows and gives float32 rows: what quantizes them is inside. Candidates take turns, in an order
that is drawn anew in each round, so that whatever else the machine does falls on all of them; a figure is float32's
median divided by the candidate's. With one thread the clock is that thread's own, which stands still while other
processes have the core. A line of JSON for each shape; a table at the end. --instructions avx2: the compiled kernel
as a CPU without AVX-512 has it.

    float32     F.linear                    bfloat16    F.linear on bfloat16, inputs and outputs converted
    reference   4-bit codes in groups of 64, made a float32 weight in each call: what runs without compiled kernels
    onednn      int8 codes of one scale a row, by oneDNN: a copy of twice the bytes of 4-bit codes, and another in
                oneDNN's order, both kept
    row, g64, g128 zeros, progressive       the compiled kernel on 4-bit codes: one scale a row, groups of 64,
                groups of 128 with zero points, whole steps in groups of 128
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ptq4dm.errors import UserError, run
from ptq4dm.files.atomic import replacing
from ptq4dm.kernels.cpu import library
from ptq4dm.kernels.cpu.w4a8 import cpu_w4a8_linear
from ptq4dm.kernels.formats.int4 import pack_int4
from ptq4dm.kernels.w8a8.layer import w8a8_linear
from ptq4dm.layers.int4_ops import rounded, weight_of

SHAPES = {
    "dit-cifar10": [(256, 256), (1024, 256), (256, 1024), (1536, 256)],
    "FLUX": [(3072, 3072), (12288, 3072), (3072, 12288)],
}
SECONDS = 2.0  # for a shape, about; at least MOST_ROUNDS[0] rounds, at most MOST_ROUNDS[1]
MOST_ROUNDS = (5, 60)


def packed(n: int, k: int, group: int | None, zeros: bool = False, steps: bool = False) -> tuple:
    """(qweight, wscales, wzeros, wsteps) of random codes."""
    groups = 1 if group is None else k // group
    qweight = pack_int4(torch.randint(-7, 8, (n, k), dtype=torch.int8), 64)
    wscales = torch.rand(n, *(() if steps else (groups,))) * k**-0.5
    wzeros = torch.randint(-3, 4, (n, groups), dtype=torch.int8) if zeros else None
    wsteps = torch.randint(1, 9, (n, groups), dtype=torch.int8) if steps else None
    return qweight, wscales if group is None or steps else wscales.half(), wzeros, wsteps


def candidates(n: int, k: int, m: int) -> dict[str, Callable[[], Tensor]]:
    """Name -> a call, everything included."""
    x, weight, bias = torch.randn(m, k), torch.randn(n, k), torch.randn(n)
    half, half_bias = weight.bfloat16(), bias.bfloat16()
    codes, scale = torch.randint(-15, 16, (n, k), dtype=torch.int8), torch.rand(n)
    layers = {
        "row": packed(n, k, None),
        "g64": packed(n, k, 64),
        "g128 zeros": packed(n, k, 128, True),
        "progressive": packed(n, k, 128, True, True),
    }

    def reference() -> Tensor:
        return F.linear(rounded(x, None, None, 8, (1,)), weight_of(*layers["g64"][:3], k), bias)

    calls = {
        "float32": lambda: F.linear(x, weight, bias),
        "bfloat16": lambda: F.linear(x.bfloat16(), half, half_bias).float(),
        "reference": reference,
        "onednn": lambda: w8a8_linear(x, codes, scale, bias, None, None, 8),
    }
    for name, layer in layers.items():
        calls[name] = lambda layer=layer: cpu_w4a8_linear(x, *layer, bias, None, None, 8)
    return calls


def medians(calls: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """Milliseconds of each; they take turns."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    names, spent = list(calls), {name: [] for name in calls}
    begin = time.perf_counter()
    for call in calls.values():
        call()
    rounds = int(min(max(SECONDS / (time.perf_counter() - begin), MOST_ROUNDS[0]), MOST_ROUNDS[1]))
    order = random.Random(0)
    for _ in range(rounds):
        order.shuffle(names)  # none always comes after the same other one, with what that leaves in caches
        for name in names:
            start = clock()
            calls[name]()
            spent[name].append((clock() - start) * 1e3)
    return {name: statistics.median(values) for name, values in spent.items()}


def machine() -> str:
    """The CPU's name and number of cores, and the load when this began."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{name}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"


def options(description: str, metavar: str, shapes: str) -> argparse.ArgumentParser:
    """The options of a benchmark of these kernels; `shapes` says what --shapes are."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", nargs="+", metavar=metavar, help=shapes)
    parser.add_argument("--instructions", choices=list(library.FLAGS), help="of the kernel (what this CPU has)")
    parser.add_argument("--json", type=Path)
    return parser


def begun(args, shapes: dict[str, list]) -> tuple[dict[str, list], str]:
    """(model -> sizes to time, this machine in words); threads, instructions and seed are set as asked for.

    Raises UserError where the kernels are not compiled.
    """
    if args.instructions:
        library.use(args.instructions)
    if not library.available():
        raise UserError(f"there is no kernel to time: {library.status()}.")
    if args.shapes is not None:
        shapes = {"": [tuple(map(int, one.split(","))) for one in args.shapes]}
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    place = f"{machine()}, {args.threads} threads, torch {torch.__version__}, {library.status()}".split(" in /")[0]
    return shapes, place


def timed(place: str, size: dict, calls: dict[str, Callable[[], Tensor]]) -> dict:
    """A row: how many times as fast as float32 each call is. It is printed, too."""
    found = medians(calls)
    ratios = {name: round(found["float32"] / spent, 2) for name, spent in found.items()}
    row = {"machine": place, **size, "float32_ms": round(found["float32"], 3), "ratio": ratios}
    print(json.dumps(row), flush=True)
    return row


def written(args, rows: list[dict], table: str) -> None:
    print("\n" + table)
    if args.json:
        with replacing(args.json) as path:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@torch.no_grad()
def main() -> None:
    parser = options(__doc__, "N,K", "outputs and inputs of Linear layers")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 256, 1024])
    args = parser.parse_args()
    shapes, place = begun(args, SHAPES)
    rows = [
        timed(place, {"model": model, "n": n, "k": k, "rows": m}, candidates(n, k, m))
        for model, sizes in shapes.items()
        for n, k in sizes
        for m in args.rows
    ]
    written(args, rows, table(rows))


def table(rows: list[dict]) -> str:
    names = [name for name in rows[0]["ratio"] if name != "float32"]
    lines = [f"{rows[0]['machine']}\n", "| N x K | rows | float32 ms | " + " | ".join(names) + " |"]
    lines.append("|" + "---|" * (3 + len(names)))
    for row in rows:
        ratios = " | ".join(f"{row['ratio'][name]:.2f}" for name in names)
        lines.append(f"| {row['n']} x {row['k']} | {row['rows']} | {row['float32_ms']:.3f} | {ratios} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
