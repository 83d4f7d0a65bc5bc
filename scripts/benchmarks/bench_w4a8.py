"""Time W4A8 layers in integers against what else a GPU offers, and against ourselves, in one run.

    python scripts/benchmarks/bench_w4a8.py [--tune SECONDS] [--rows 1024 4096 16384] [--layers 3072,3072 ...]
        [--output out/bench-w4a8]

One JSON line for each shape: microseconds, ratios to bf16 `F.linear`, operations a second of products alone. Every
time is the median over replays of a CUDA graph on operands that no cache holds; the candidates of a shape take turns.
All but "... alone" include the quantization of inputs, bias and, where weights are unpacked first, that.

    progressive     4-bit weights under whole-number steps of a row, in groups of 128 (kernels/w4/progressive.py)
    grouped         scales and zero points in groups of 128, after the sums (kernels/w4/grouped.py)
    row-mix         the same with a tenth of the outputs, drawn at random, in 8 bits (kernels/w4/row_mix.py)
    codebook        16 int8 levels for the codes, of the whole weight, in groups of 128; "by row": of each output
    codebook row    the same with one scale an output, of the whole weight
    channel         one scale and zero point an output
    ..., unpacked   the same weights as int8 in memory, made in every call; scales of groups are rounded into them
    int8 W8A8, fp8 W4A8, W4A16      our other kernels: weights of 8 bits; in groups of 64 under e4m3 inputs, without a
                                    branch; and unpacked to bf16 for cuBLAS

--tune first searches settings for these shapes, and int8 W8A8's, for so many seconds, and records them where kernels
look; the file goes to --output as well.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
from pathlib import Path

import torch
from bench_common import error, made_with
from torch.nn import functional as F

from ptq4dm.cli.benches.tune import check_gpu, linear_cases, tune
from ptq4dm.errors import UserError, run
from ptq4dm.kernels.formats import int4, int8
from ptq4dm.kernels.runtime.settings import best_config, served, tuned_file
from ptq4dm.kernels.tuning import launches_integer, launches_w8a8
from ptq4dm.kernels.tuning.stopwatch import COLD, race
from ptq4dm.kernels.w4 import grouped, integer, progressive, row_mix, tokens_triton
from ptq4dm.kernels.w4 import layer as w4
from ptq4dm.kernels.w4.int4_codes import int4_codes
from ptq4dm.kernels.w4.products import product_grouped, product_progressive
from ptq4dm.kernels.w8a8 import layer as w8a8
from ptq4dm.kernels.w8a8 import steps
from ptq4dm.kernels.w8a8.window import same_window

LAYERS = ["3072,3072", "12288,3072", "3072,12288", "1152,1152"]  # N, K
SIZE = 128
CHECKED = 64  # rows that are compared with the formula


class Set:
    """A layer's operands in all forms, on random weights."""

    def __init__(self, m: int, n: int, k: int, seed: int):
        generator = torch.Generator("cuda").manual_seed(seed)
        normal = functools.partial(torch.randn, generator=generator, device="cuda")
        self.x, self.bias, weight = normal(m, k).bfloat16(), normal(n).bfloat16(), normal(n, k) / k**0.5
        self.weight = weight.bfloat16()
        scale = weight.abs().amax(1) / int8.weight_limit(8)
        self.int8 = int8.quantize_weight(weight, scale), scale, self.bias, None, None, 8
        codes, scales = int4.quantize_groups(weight, int4.GROUP, torch.bfloat16)
        self.svdq = int4.pack_int4(codes, int4.GROUP), scales, None, None, None, self.bias
        codes, scales = int4.quantize_groups(weight, SIZE, torch.bfloat16)
        zeros = torch.zeros_like(scales, dtype=torch.int8)
        packed = int4.pack_int4(codes, int4.GROUP)
        self.grouped = packed, scales, zeros, self.bias
        wide = torch.randperm(n, generator=generator, device="cuda")[: n // 10].sort().values
        mixed_scales, mixed = scales.clone(), codes.clone()
        mixed_scales[wide] = (weight[wide].view(len(wide), -1, SIZE).abs().amax(2) / 127).bfloat16()
        mixed[wide] = int4.quantize_codes(weight[wide], mixed_scales[wide], -127, 127)
        few, mixed = zeros[: n - len(wide)].contiguous(), int4.pack_int4(int4.halved(mixed, wide), int4.GROUP)
        self.row_mix = mixed, mixed_scales, few, wide.int(), self.bias
        row = scales.float().amax(1) / 16
        whole = (scales / row[:, None]).round().clamp(1, 16).to(torch.int8)
        self.progressive = packed, whole, zeros, row, self.bias
        levels = torch.arange(-128, 128, 16, dtype=torch.int8, device="cuda").clamp(-127)[None]
        self.codebook = packed, scales, None, self.bias, levels
        self.codebook_by_row = packed, scales, None, self.bias, levels.repeat(n, 1)
        self.codebook_channel = packed, row[:, None].contiguous(), None, self.bias, levels
        self.channel = packed, row[:, None].contiguous(), zeros[:, :1].contiguous(), self.bias

    def progressive_unpacked(self) -> torch.Tensor:
        packed, whole, zeros, row, bias = self.progressive
        codes = progressive.progressive_codes(packed, whole, zeros, self.x.shape[1])
        return w8a8.w8a8_linear(self.x, codes, row, bias, None, None, 8)

    def grouped_unpacked(self) -> torch.Tensor:
        packed, scales, zeros, bias = self.grouped
        return w8a8.w8a8_linear(self.x, *int4_codes(packed, scales, zeros, self.x.shape[1]), bias, None, None, 8)


CANDIDATES = {
    "bf16": lambda one: F.linear(one.x, one.weight, one.bias),
    "int8 W8A8": lambda one: w8a8.w8a8_linear(one.x, *one.int8),
    "fp8 W4A8": lambda one: w4.svdq_linear(one.x, *one.svdq, "fp8", 0.0),
    "W4A16": lambda one: w4.svdq_linear(one.x, *one.svdq, "none", 0.0),
    "progressive": lambda one: progressive.progressive_linear(one.x, *one.progressive),
    "progressive, unpacked": Set.progressive_unpacked,
    "channel": lambda one: grouped.grouped_linear(one.x, *one.channel),
    "grouped": lambda one: grouped.grouped_linear(one.x, *one.grouped),
    "codebook": lambda one: grouped.grouped_linear(one.x, *one.codebook),
    "codebook by row": lambda one: grouped.grouped_linear(one.x, *one.codebook_by_row),
    "codebook row": lambda one: grouped.grouped_linear(one.x, *one.codebook_channel),
    "row-mix": lambda one: row_mix.row_mix_grouped(one.x, *one.row_mix),
    "grouped, unpacked": Set.grouped_unpacked,
}


def products(one: Set) -> dict:
    """name -> function without arguments: products alone, of what the launches before them leave."""
    (m, k), n = one.x.shape, len(one.weight)
    new = functools.partial(torch.empty, device="cuda")
    tokens = new(m, tokens_triton.packed_inputs(k), dtype=torch.int8), new(m), new(m, dtype=torch.int32)
    factors, scales = new(k // SIZE, n, dtype=torch.int32), new(k // SIZE, n)
    packed, whole, zeros, row, bias = one.progressive
    out, sizes = one.x.new_empty(m, n), (one.x.device, m, n, k)
    config, after = best_config("progressive.product", *sizes), best_config("grouped.product", *sizes)
    tokens_triton.prepare(one.x, tokens, whole, zeros, None, (factors, None), (n, k // SIZE))
    plain = torch.empty_like(factors)
    tokens_triton.prepare(one.x, tokens, None, zeros, one.grouped[1], (plain, scales), (n, k // SIZE))
    mixed, mixed_scales, few, wide, _ = one.row_mix
    width = integer.table_width(n, len(mixed))
    tables = new(k // SIZE, width, dtype=torch.int32), new(k // SIZE, width)
    slots, ready, sums = integer.room_of_two_widths(one.x, n, len(mixed) - n, after)
    tokens_triton.prepare(
        one.x, tokens, None, few, mixed_scales, tables, (len(mixed), k // SIZE), (wide, slots, ready)
    )
    codes, scale, *_ = one.int8
    layer = steps.Parameters(codes, scale, bias, tokens[1], None)
    found = {
        "grouped alone": lambda: product_grouped.product(
            tokens[:2], packed, (plain, scales), bias, out, SIZE, after
        ),
        "row-mix alone": lambda: product_grouped.product(
            tokens[:2], mixed, tables, bias, out, SIZE, after, (slots, ready, sums)
        ),
        "int8 W8A8 alone": lambda: steps.multiply(tokens[0], same_window(m, 1, 1), layer, torch.bfloat16),
    }  # fmt: skip
    if not config.get("UNPACK"):
        found["progressive alone"] = lambda: product_progressive.product(
            tokens, packed, factors, row, bias, out, "steps", SIZE, config
        )
    return found


def checked(one: Set) -> dict[str, float]:
    """Relative distances to the formulas on the first rows. Raises UserError where one is too far."""
    few, found = one.x[:CHECKED], {}
    for name, op, reference, operands in (
        ("progressive", progressive.progressive_linear, progressive.reference, one.progressive),
        ("channel", grouped.grouped_linear, grouped.reference, one.channel),
        ("grouped", grouped.grouped_linear, grouped.reference, one.grouped),
        ("codebook", grouped.grouped_linear, grouped.reference, one.codebook),
        ("codebook by row", grouped.grouped_linear, grouped.reference, one.codebook_by_row),
        ("codebook row", grouped.grouped_linear, grouped.reference, one.codebook_channel),
        ("row-mix", row_mix.row_mix_grouped, row_mix.reference, one.row_mix),
    ):
        found[name] = error(op(one.x, *operands)[:CHECKED], reference(few, *operands))
    if not max(found.values()) < 4e-3:  # bf16 rounds to 2e-3
        raise UserError(f"our kernels are wrong: {found}.")
    return found


def measure(m: int, n: int, k: int) -> dict:
    moved = 2 * m * (k + n) + n * k // 2
    sets = [Set(m, n, k, seed) for seed in range(max(1, min(8, math.ceil(COLD / moved))))]
    row: dict = {"M": m, "N": n, "K": k, "error": checked(sets[0])}
    calls = {name: [functools.partial(function, one) for one in sets] for name, function in CANDIDATES.items()}
    every = [products(one) for one in sets]
    times = row["us"] = race(calls | {name: [one[name] for one in every] for name in every[0]}, 7)
    row["ratio to bf16"] = {name: round(times["bf16"] / spent, 3) for name, spent in times.items()}
    row["TOP/s"] = {name: round(2 * m * n * k / times[name] / 1e6) for name in ("bf16", *every[0])}
    row["us"] = {name: round(spent, 1) for name, spent in times.items()}
    device = torch.device("cuda")
    row["settings"] = {mode: best_config(f"{mode}.product", device, m, n, k) for mode in ("progressive", "grouped")}
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--layers", nargs="+", default=LAYERS, help="N,K")
    parser.add_argument("--tune", type=float, metavar="SECONDS", help="search settings first")
    parser.add_argument("--output", type=Path, default=Path("out/bench-w4a8"))
    args = parser.parse_args()
    check_gpu()
    shapes = [(m, *map(int, layer.split(","))) for layer in args.layers for m in args.rows]
    args.output.mkdir(parents=True, exist_ok=True)
    if not served(torch.device("cuda")):
        raise UserError("these kernels need compute capability 8.0.")
    if args.tune:
        modes = ("progressive", "grouped")
        eight = [
            one for one in launches_w8a8.launches(linear_cases(shapes)) if one.form == "int8" and not one.on_load
        ]
        four = [one for shape in shapes for mode in modes for one in launches_integer.launches(*shape, mode)]
        tune(four + eight, None, args.tune)
        (args.output / tuned_file().name).write_text(tuned_file().read_text())
    facts = made_with()
    with open(args.output / "bench_w4a8.jsonl", "w") as lines:
        for shape in shapes:
            line = json.dumps(measure(*shape) | facts)
            print(line, flush=True)
            lines.write(line + "\n")
            lines.flush()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    run(main)
