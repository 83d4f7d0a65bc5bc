"""Time the parts of the grouped W4A8 product, each alone and left out: what runs at the same time as what.

    python scripts/benchmarks/bench_overlap.py [--rows 1024 4096 16384] [--layers 3072,3072 3072,12288]
        [--output out/bench-overlap]

The loop of kernels/w4/products/product_grouped.py, which rows of 4 bits and of two widths go through, in groups of
128 with the setting that is shipped. One JSON line for each shape: microseconds of

    all         everything
    loads       codes of inputs and packed weights to shared memory by TMA, and from there to registers
    unpacking   nibbles to int8, with the table of zero points: of weights that stay in registers
    products    int8 tensor cores: of operands that stay where they are
    scaling     whole-number sums to floats, times the scale, with the table of scales: of sums that stay in registers
    no ...      all but one of them

"in turns" is what the four take alone, added up, and "overlap" the share of it that all together save. Scaling alone
scales sums plus the number of the step, an operation more for each, else the compiler takes it out of the loop; loads
alone read the codes of inputs into registers, which products read where they are; and unpacking alone has a product
with 16 rows, an eighth, that needs its results.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import triton
import triton.language as tl
from bench_common import Lines, layers_on_hopper, made_with
from bench_weight_order import BYTES, MANY, SIZE, Operands

from ptq4dm.errors import UserError, run
from ptq4dm.kernels.runtime.integers import cdiv
from ptq4dm.kernels.runtime.launch import Launch
from ptq4dm.kernels.runtime.settings import best_config
from ptq4dm.kernels.tuning.stopwatch import race
from ptq4dm.kernels.w4.products.tiles import stored, tile_place
from ptq4dm.kernels.w4.products.words import packed, together, whole

PARTS = ("loads", "unpacking", "products", "scaling")
FORMS = {"all": PARTS, **{part: (part,) for part in PARTS}}
FORMS |= {f"no {part}": tuple(other for other in PARTS if other != part) for part in ("loads", "scaling")}


@triton.jit
def _loads_kernel(
    x_desc, w_desc, y_ptr, M, N, groups,
    BM: tl.constexpr, BN: tl.constexpr, BAND: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Both as words of four bytes, of which each leaves one operation behind."""
    top, left = tile_place(tl.program_id(0), M, N, BM, BN, BAND)
    x, w = tl.zeros((BM, 32), tl.int32), tl.zeros((BN, 16), tl.int32)
    for g in tl.range(groups, num_stages=STAGES):
        x ^= x_desc.load([top, g * 32])
        w ^= w_desc.load([left, g * 16])
    tl.store(y_ptr + tl.program_id(0), (tl.sum(tl.sum(x, 1), 0) + tl.sum(tl.sum(w, 1), 0)).to(tl.bfloat16))


@triton.jit
def _parts_kernel(
    x_desc, w_desc, factors_ptr, scales_ptr, row_scale_ptr, y_desc, y_ptr, M, N, K, groups,
    LOADS: tl.constexpr, UNPACKING: tl.constexpr, PRODUCTS: tl.constexpr, SCALING: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BAND: tl.constexpr, STAGES: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    top, left = tile_place(tl.program_id(0), M, N, BM, BN, BAND)
    rows, columns = top + tl.arange(0, BM), left + tl.arange(0, BN)
    x, raw = x_desc.load([top, 0]), tl.reshape(w_desc.load([left, 0]), (BN, 2, 32))
    a = tl.load(factors_ptr + columns, mask=columns < N, other=0)[:, None, None] >> 8
    w = together(whole(raw, None, a, 0, PACKED), whole(raw, None, a, 1, PACKED))
    sums = tl.dot(w, x.T, out_dtype=tl.int32)
    held, few = sums, tl.zeros((BN, 16), tl.int32)
    y = tl.zeros((BN, BM), tl.float32)
    for g in tl.range(groups, num_stages=STAGES):
        if LOADS:
            raw = tl.reshape(w_desc.load([left, g * 64]), (BN, 2, 32))
            x = x_desc.load([top, g * 128])
        if UNPACKING:
            a = tl.load(factors_ptr + g * N + columns, mask=columns < N, other=0)[:, None, None] >> 8
            w = together(whole(raw, None, a, 0, PACKED), whole(raw, None, a, 1, PACKED))
            if not PRODUCTS:
                few = tl.dot(w, tl.full((128, 16), 1, tl.int8), few, out_dtype=tl.int32)
        if PRODUCTS and SCALING:
            sums = tl.dot(w, x.T, out_dtype=tl.int32)
        elif PRODUCTS:
            sums = tl.dot(w, x.T, sums, out_dtype=tl.int32)
        elif SCALING:
            sums = held + g
        if SCALING:
            scale = tl.load(scales_ptr + g * N + columns, mask=columns < N, other=0.0)
            y += sums.to(tl.float32) * scale[:, None]
    if not SCALING:
        y += sums.to(tl.float32)
    if not PRODUCTS:
        y += tl.sum(few, 1).to(tl.float32)[:, None]
    row_scale = tl.load(row_scale_ptr + rows, mask=rows < M, other=0.0)
    stored((y * row_scale[None, :]).T, top, left, None, y_desc, y_ptr, M, N, BM, BN)


def through(one: Operands, form: str, config: dict) -> Callable[[], torch.Tensor]:
    (m, n, k), (bm, bn), parts = one.size, (config["BM"], config["BN"]), FORMS[form]
    fixed = dict(M=m, N=n, groups=k // SIZE, BM=bm, BN=bn, BAND=config["BAND"], STAGES=config["num_stages"])
    fixed |= {name: config.get(name) for name in ("num_warps", "num_stages", "maxnreg")}
    grid, blocks = (cdiv(m, bm) * cdiv(n, bn),), dict(x_desc=(bm, SIZE), w_desc=(bn, BYTES), y_desc=(bm, bn))
    if form == "loads":
        words = {"x_desc": (bm, SIZE // 4), "w_desc": (bn, BYTES // 4)}
        launch = Launch(_loads_kernel, grid, words, **fixed)
        operands = one.tokens[0].view(torch.int32), one.rows.view(torch.int32), one.out
    else:
        flags = {part.upper(): part in parts for part in PARTS}
        launch = Launch(_parts_kernel, grid, blocks, K=k, PACKED=packed(config, _parts_kernel), **flags, **fixed)
        operands = one.tokens[0], one.rows, one.factors, one.scales, one.tokens[1], one.out, one.out

    def call() -> torch.Tensor:
        launch(*operands)
        return one.out

    return call


def measure(m: int, n: int, k: int) -> dict:
    config = {"maxnreg": None} | best_config("grouped.product", torch.device("cuda"), m, n, k)
    config = config if config["TMA"] else MANY["grouped"]
    one = Operands("grouped", m, n, k, config["BN"], 0)
    if not torch.equal(through(one, "all", config)().clone(), one.shipped(config)):
        raise UserError(f"the loop here gives another result than the one that is shipped, at {m}, {n}, {k}.")
    calls = {"shipped": [lambda: one.shipped(config)]} | {form: [through(one, form, config)] for form in FORMS}
    times = race(calls, 9)
    turns = sum(times[part] for part in PARTS)
    return {
        "us": {name: round(spent, 1) for name, spent in times.items()},
        "in turns": round(turns, 1),
        "overlap": round(1 - times["all"] / turns, 3),
        "longest alone": round(max(times[part] for part in PARTS) / times["all"], 3),
        "settings": config,
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--layers", nargs="+", default=["3072,3072", "3072,12288"], help="N,K: multiples of 128")
    parser.add_argument("--output", type=Path, default=Path("out/bench-overlap"))
    args = parser.parse_args()
    layers = layers_on_hopper(args.layers)
    lines = Lines(args.output / "bench_overlap.jsonl", made_with())
    for n, k in layers:
        for m in args.rows:
            key = {"M": m, "N": n, "K": k}
            if not lines.has(**key):
                lines.add(key | measure(m, n, k))
            torch.cuda.empty_cache()


if __name__ == "__main__":
    run(main)
