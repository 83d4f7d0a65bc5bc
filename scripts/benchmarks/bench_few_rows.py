"""Time Linear layers of few rows, such as adaLN and time embeddings, with weights of few bits: one JSON line a shape.

    python scripts/benchmarks/bench_few_rows.py [--rows 1 2 4 8 16] [--shapes N,K ...] [--tune SECONDS]
        [--json scripts/results/few-rows.jsonl]
    python scripts/benchmarks/bench_few_rows.py --device cpu --threads 1

Microseconds of a call with bias; the candidates of a shape take turns. On a GPU in CUDA graphs, in bf16, on operands
that no cache holds; on a CPU in float32, everything included, and with one thread by the thread's own clock.
A line has the error of each of our kernels, too, against float64 on the same codes.

    GPU  bf16              F.linear, which is cuBLAS
         lut q2, q3, q4    look-up tables (kernels/lut/look_up.py), groups of 128
         planes q2, ...    sign planes on tensor cores (kernels/lut/planes.py)
         loop q3           the same bits, a weight made of them in the loop (few_rows_baselines.py): OPTQ's place
         unpack q3         a weight of 16 bits made in memory in each call, then cuBLAS
         w4a16             4-bit weights in groups of 64 (kernels/w4)
         tinygemm          torch's int4 weights in groups of 128, where this torch has them
    CPU  float32           F.linear               onednn    int8 weights and inputs, one scale a row
         w4a8              4-bit weights in groups of 128 under 8-bit inputs (kernels/cpu/w4a8.cpp)
         lut q2, q3, q4    byte shuffles (kernels/cpu/lut.cpp), groups of 128

--tune first searches settings of our kernels for these shapes on this GPU, for so many seconds, and records them.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from bench_common import error
from bench_cpu_w4 import machine, medians, packed
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "comparisons"))
from conditions import commit  # noqa: E402

from ptq4dm.cli.benches.tune import check_gpu, tune  # noqa: E402
from ptq4dm.errors import UserError, run  # noqa: E402
from ptq4dm.files.atomic import replacing  # noqa: E402
from ptq4dm.kernels.cpu import library  # noqa: E402
from ptq4dm.kernels.cpu.w4a8 import cpu_w4a8_linear  # noqa: E402
from ptq4dm.kernels.formats.int4 import GROUP, pack_int4, quantize_groups  # noqa: E402
from ptq4dm.kernels.lut import layer as lut  # noqa: E402
from ptq4dm.kernels.lut.reference import reference  # noqa: E402
from ptq4dm.kernels.tuning import launches_lut, launches_w4  # noqa: E402
from ptq4dm.kernels.tuning.launches_lut import operands  # noqa: E402
from ptq4dm.kernels.tuning.stopwatch import COLD, race  # noqa: E402
from ptq4dm.kernels.w4 import layer as w4  # noqa: E402
from ptq4dm.kernels.w8a8.layer import w8a8_linear  # noqa: E402

SHAPES = ["18432,3072", "6912,1152", "9216,3072", "6144,3072"]  # FLUX's adaLN, DiT-XL's, FLUX's single, its last
SIZE, MOST = 128, 32
PLANES = (2, 3, 4)


def layer_of(m: int, n: int, k: int, bits: int, device: torch.device, seed: int) -> tuple:
    return operands(m, n, k, bits, SIZE, False, device, seed)


def on_gpu(m: int, n: int, k: int) -> tuple[dict[str, float], dict[str, float], dict[str, str]]:
    """(microseconds, errors, why a candidate is left out)."""
    device = torch.device("cuda")
    left: dict[str, str] = {}

    def sets(bits: float, make: Callable[[int], Callable[[], Tensor]]) -> list[Callable[[], Tensor]]:
        return [make(seed) for seed in range(min(MOST, math.ceil(COLD / (n * k * bits / 8))))]

    def floats(seed: int) -> Callable[[], Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        x, weight, bias = (
            torch.randn(size, generator=generator, device=device).bfloat16() for size in ((m, k), (n, k), (n,))
        )
        return lambda: F.linear(x, weight, bias)

    def four_bits(seed: int) -> Callable[[], Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        x, weight = (torch.randn(size, generator=generator, device=device) for size in ((m, k), (n, k)))
        codes, scales = quantize_groups(weight, GROUP, torch.bfloat16)
        layer = pack_int4(codes, GROUP), scales, None, None, None, torch.zeros(n, device=device).bfloat16()
        return functools.partial(w4.svdq_linear, x.bfloat16(), *layer, "none", 0.0)

    def ours(product: Callable, bits: int) -> Callable[[int], Callable[[], Tensor]]:
        return lambda seed: functools.partial(product, *layer_of(m, n, k, bits, device, seed))

    def in_loop(seed: int) -> Callable[[], Tensor]:
        from few_rows_baselines import dequantized_in_loop

        x, words, scales, _, _, outputs = layer_of(m, n, k, 3, device, seed)
        return functools.partial(dequantized_in_loop, x, words, scales, outputs)

    def theirs(seed: int) -> Callable[[], Tensor]:
        from few_rows_baselines import tinygemm

        return tinygemm(torch.randn(m, k, device=device).bfloat16(), n, k, SIZE, seed)

    makes = {"bf16": (16, floats), "w4a16": (4, four_bits), "loop q3": (3, in_loop), "tinygemm": (4, theirs)}
    for bits in PLANES:
        makes[f"lut q{bits}"] = bits, ours(lut.looked_up, bits)
        makes[f"planes q{bits}"] = bits, ours(lut.by_planes, bits)
    makes["unpack q3"] = 3, ours(lut.by_cublas, 3)
    candidates = {}
    for name, (bits, make) in makes.items():
        try:
            make(0)()
            candidates[name] = sets(bits, make)
        except (RuntimeError, AttributeError, NotImplementedError) as failed:
            left[name] = str(failed).splitlines()[0][:200]
    errors = {}
    for bits in PLANES:
        layer = layer_of(m, n, k, bits, device, 0)
        right = reference(layer[0].double(), *layer[1:])
        products = {"lut": lut.looked_up, "planes": lut.by_planes}
        errors |= {f"{name} q{bits}": error(product(*layer), right) for name, product in products.items()}
    layer = layer_of(m, n, k, 3, device, 0)
    right = reference(layer[0].double(), *layer[1:4], None, n)
    if "loop q3" in candidates:
        errors["loop q3"] = error(in_loop(0)(), right)
    return race(candidates), errors, left


def on_cpu(m: int, n: int, k: int) -> tuple[dict[str, float], dict[str, float], dict[str, str]]:
    """The same."""
    device = torch.device("cpu")
    x, weight, bias = torch.randn(m, k), torch.randn(n, k), torch.randn(n)
    codes, scale, four = torch.randint(-100, 101, (n, k), dtype=torch.int8), torch.rand(n), packed(n, k, SIZE)
    calls: dict[str, Callable[[], Tensor]] = {
        "float32": lambda: F.linear(x, weight, bias),
        "onednn": lambda: w8a8_linear(x, codes, scale, bias, None, None, 8),
        "w4a8": lambda: cpu_w4a8_linear(x, *four, bias, None, None, 8),
    }
    errors = {}
    for bits in PLANES:
        layer = layer_of(m, n, k, bits, device, 0)
        calls[f"lut q{bits}"] = functools.partial(lut.bcq_linear, *layer)
        errors[f"lut q{bits}"] = error(lut.bcq_linear(*layer), reference(layer[0].double(), *layer[1:]))
    return {name: spent * 1e3 for name, spent in medians(calls).items()}, errors, {}


def search(shapes: list[tuple[int, int]], rows: list[int], seconds: float) -> None:
    launches = [
        one for n, k in shapes for m in rows
        for one in (*(launches_lut.LutLaunch(m, n, k, mode) for mode in launches_lut.RUN),
                    *launches_w4.launches(m, n, k, 0, "none"))
    ]  # fmt: skip
    tune(launches, seconds=seconds)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--shapes", nargs="+", metavar="N,K", default=SHAPES, help="K a multiple of 128")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--tune", type=float, metavar="SECONDS", help="search settings on this GPU first")
    parser.add_argument("--json", type=Path, help="a file for the lines")
    args = parser.parse_args()
    shapes = [tuple(map(int, shape.split(","))) for shape in args.shapes]
    if any(k % SIZE for _, k in shapes) or any(not 0 < m <= lut.SHORT for m in args.rows):
        raise UserError(f"K is a multiple of {SIZE} and rows are from 1 to {lut.SHORT} here.")
    if args.device == "cuda":
        check_gpu()
        place = torch.cuda.get_device_name()
        if args.tune:
            search(shapes, args.rows, args.tune)
    else:
        if not library.available():
            raise UserError(f"there is no kernel to time: {library.status()}.")
        torch.set_num_threads(args.threads)
        place = f"{machine()}, {args.threads} threads, {library.status()}".split(" in /")[0]
    measure = on_gpu if args.device == "cuda" else on_cpu
    lines = []
    for n, k in shapes:
        for m in args.rows:
            torch.manual_seed(0)
            found, errors, left = measure(m, n, k)
            best = found["bf16" if args.device == "cuda" else "float32"]
            row = {
                "device": place, "torch": torch.__version__, "commit": commit(), "n": n, "k": k, "rows": m,
                "microseconds": {name: round(spent, 2) for name, spent in found.items()},
                "ratio": {name: round(best / spent, 3) for name, spent in found.items()},
                "error": {name: float(f"{one:.3g}") for name, one in errors.items()}, "left_out": left,
            }  # fmt: skip
            lines.append(json.dumps(row))
            print(lines[-1], flush=True)
    if args.json:
        with replacing(args.json) as path:
            path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    run(main)
