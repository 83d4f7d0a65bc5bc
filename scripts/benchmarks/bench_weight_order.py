"""Time W4A8 products with the loads of their weights changed, or left out: what another order in memory could buy.

    python scripts/benchmarks/bench_weight_order.py [--rows 16 1024 4096 16384] [--layers 3072,3072 ...]
        [--output out/bench-weight-order]

Products alone, of the progressive and the grouped kind (kernels/w4/products), in groups of 128, with one setting for
each number of rows. One JSON line for each shape and kind: microseconds, and shares of the time of "rows". Every time
is the median over replays of a CUDA graph on operands that no cache holds; the forms take turns. What one card and
commit have measured is not measured again.

    shipped     the product as layers have it, with the same setting
    rows        the same loop here: packed rows one after the other, as layers store them; a tile is BN parts of rows
    tiles       weights stored tile by tile in the order of the loop: a tile is one block of memory
    resident    every tile is the first one: its loads never leave the cache, as no order could make them
    none        a tile is loaded once and stays in registers: nothing is loaded in the loop, only unpacked
    int8        int8 weights: twice the bytes, nothing to unpack, no tables of groups

"rows" and "tiles" give the same bits, as "int8" does, or the run ends. What an order buys is 1 - tiles / rows; no
order can buy more than 1 - none / rows, which is all that loading costs beside the other work.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable
from pathlib import Path

import torch
import triton
import triton.language as tl
from bench_common import Lines, layers_on_hopper, made_with
from bench_w4a8 import LAYERS
from torch import Tensor

from ptq4dm.errors import UserError, run
from ptq4dm.kernels.runtime.integers import cdiv
from ptq4dm.kernels.runtime.launch import Launch
from ptq4dm.kernels.tuning.stopwatch import COLD, race
from ptq4dm.kernels.w4 import tokens_triton
from ptq4dm.kernels.w4.products import product_grouped, product_progressive
from ptq4dm.kernels.w4.products.tiles import stored, tile_place
from ptq4dm.kernels.w4.products.words import packed, together, token_rows, whole
from ptq4dm.kernels.w4.progressive import progressive_codes

SIZE, BYTES = 128, 64  # inputs of a group, which is a step of the loop, and their bytes
KINDS = ("progressive", "grouped")
FORMS = ("rows", "tiles", "resident", "none", "int8")
FEW = dict(TMA=True, BM=16, BN=128, BAND=8, num_warps=4, num_stages=5)
MANY = {
    "progressive": dict(TMA=True, BM=128, BN=128, BAND=8, num_warps=4, num_stages=3),
    "grouped": dict(TMA=True, BM=128, BN=64, BAND=8, num_warps=4, num_stages=3, maxnreg=168),
}


@triton.jit(do_not_specialize=["down", "onward", "right"])
def _product_kernel(
    x_desc, w_desc, factors_ptr, scales_ptr, row_scale_ptr, column_scale_ptr, y_desc, y_ptr, M, N, K, groups,
    down, onward, right,
    GROUPED: tl.constexpr, FORM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BAND: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """The tile of step g of the outputs from `left` on begins at row left * down + g * onward, byte g * right."""
    top, left = tile_place(tl.program_id(0), M, N, BM, BN, BAND)
    rows, columns = top + tl.arange(0, BM), left + tl.arange(0, BN)
    sums = tl.zeros((BN, BM), tl.int32)
    y = tl.zeros((BN, BM), tl.float32)
    held = w_desc.load([left, 0])
    for g in range(groups):
        raw = held
        if FORM != "none":
            raw = w_desc.load([left * down + g * onward, g * right])
        if FORM == "int8":
            w = raw
        else:
            raw = tl.reshape(raw, (BN, 2, 32))
            factor = tl.load(factors_ptr + g * N + columns, mask=columns < N, other=0)[:, None, None]
            a = factor >> 8
            if GROUPED:
                w = together(whole(raw, None, a, 0, PACKED), whole(raw, None, a, 1, PACKED))
            else:
                s1 = factor & 255
                w = together(whole(raw, s1, a, 0, PACKED), whole(raw, s1, a, 1, PACKED))
        x = token_rows(x_desc, top, g * 128, M, K, BM, 128, True)
        if GROUPED:
            scale = tl.load(scales_ptr + g * N + columns, mask=columns < N, other=0.0)
            y += tl.dot(w, x, out_dtype=tl.int32).to(tl.float32) * scale[:, None]
        else:
            sums = tl.dot(w, x, sums, out_dtype=tl.int32)
    row_scale = tl.load(row_scale_ptr + rows, mask=rows < M, other=0.0)
    if GROUPED:
        y *= row_scale[None, :]
    else:
        column_scale = tl.load(column_scale_ptr + columns, mask=columns < N, other=0.0)
        y = sums.to(tl.float32) * (column_scale[:, None] * row_scale[None, :])
    stored(y.T, top, left, None, y_desc, y_ptr, M, N, BM, BN)


class Operands:
    """A layer with zero points in groups of 128, on random codes; K a multiple of 128, N of a tile's outputs."""

    def __init__(self, kind: str, m: int, n: int, k: int, bn: int, seed: int, device: str = "cuda"):
        generator = torch.Generator(device).manual_seed(seed)
        whole_numbers = functools.partial(torch.randint, generator=generator, device=device, dtype=torch.int8)
        self.kind, self.size, groups = kind, (m, n, k), k // SIZE
        new = functools.partial(torch.empty, device=device)
        x = torch.randn(m, k, generator=generator, device=device).bfloat16()
        self.rows = whole_numbers(-128, 128, (n, k // 2))
        self.tokens = new(m, k, dtype=torch.int8), new(m), None
        steps = whole_numbers(4, 13, (n, groups)) if kind == "progressive" else None
        zeros, scales = whole_numbers(-2, 3, (n, groups)), torch.full((n, groups), 2.0**-7, device=device)
        self.factors, self.scales = new(groups, n, dtype=torch.int32), new(groups, n)
        self.column_scale = scales[:, 0].contiguous()
        tokens_triton.prepare(x, self.tokens, steps, zeros, scales, (self.factors, self.scales), (n, groups))
        ones = torch.ones_like(zeros) if steps is None else steps
        self.int8 = progressive_codes(self.rows.view(torch.uint8), ones, zeros, k)
        self.tiles = self.rows.view(n // bn, bn, groups, BYTES).transpose(1, 2).reshape(-1, BYTES).contiguous()
        self.out = new(m, n, dtype=torch.bfloat16)

    def shipped(self, config: dict) -> Tensor:
        qweight, size = self.rows.view(torch.uint8), SIZE
        if self.kind == "grouped":
            tables = self.factors, self.scales
            product_grouped.product(self.tokens[:2], qweight, tables, None, self.out, size, config)
        else:
            config = config | {"BK": size}
            product_progressive.product(
                self.tokens, qweight, self.factors, self.column_scale, None, self.out, "steps", size, config
            )
        return self.out

    def through(self, form: str, config: dict) -> Callable[[], Tensor]:
        (m, n, k), (bm, bn) = self.size, (config["BM"], config["BN"])
        weight = self.int8 if form == "int8" else self.tiles if form == "tiles" else self.rows
        down, onward, right = {
            "rows": (1, 0, BYTES), "int8": (1, 0, SIZE), "tiles": (k // SIZE, bn, 0)
        }.get(form, (0, 0, 0))  # fmt: skip
        blocks = dict(x_desc=(bm, SIZE), w_desc=(bn, SIZE if form == "int8" else BYTES), y_desc=(bm, bn))
        launch = Launch(
            _product_kernel, (cdiv(m, bm) * cdiv(n, bn),), blocks, M=m, N=n, K=k, groups=k // SIZE,
            down=down, onward=onward, right=right, GROUPED=self.kind == "grouped",
            FORM=form if form in ("none", "int8") else "codes", BM=bm, BN=bn, BAND=config["BAND"],
            PACKED=packed(config, _product_kernel), num_warps=config["num_warps"],
            num_stages=config["num_stages"], maxnreg=config.get("maxnreg"),
        )  # fmt: skip

        def call() -> Tensor:
            tables = self.factors, self.scales, self.tokens[1], self.column_scale
            launch(self.tokens[0], weight, *tables, self.out, self.out)
            return self.out

        return call

    def check(self, config: dict) -> None:
        """Raises UserError unless all forms that are right give the same bits."""
        right = self.shipped(config).clone()
        for form in ("rows", "tiles", "int8"):
            if not torch.equal(self.through(form, config)(), right):
                raise UserError(f"'{form}' of {self.kind} {self.size} gives another result.")


def measure(kind: str, m: int, n: int, k: int) -> dict:
    config = FEW if m <= 16 else MANY[kind]
    count = min(32, math.ceil(COLD / (m * k + n * k // 2 + 2 * m * n)))
    sets = [Operands(kind, m, n, k, config["BN"], seed) for seed in range(count)]
    sets[0].check(config)
    calls = {"shipped": [functools.partial(one.shipped, config) for one in sets]}
    calls |= {form: [one.through(form, config) for one in sets] for form in FORMS}
    times = race(calls, 7)
    shares = {name: round(spent / times["rows"], 3) for name, spent in times.items()}
    return {
        "us": {name: round(spent, 2) for name, spent in times.items()},
        "share of rows": shares,
        "an order buys": round(1 - shares["tiles"], 3),
        "loading is at most": round(1 - shares["none"], 3),
        "TB/s of weights": round(n * k / 2 / times["rows"] / 1e6, 2),
        "settings": config,
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 1024, 4096, 16384])
    parser.add_argument("--layers", nargs="+", default=LAYERS[:3], help="N,K: both multiples of 128")
    parser.add_argument("--output", type=Path, default=Path("out/bench-weight-order"))
    args = parser.parse_args()
    layers = layers_on_hopper(args.layers)
    lines = Lines(args.output / "bench_weight_order.jsonl", made_with())
    for kind in KINDS:
        for n, k in layers:
            for m in args.rows:
                key = {"kind": kind, "M": m, "N": n, "K": k}
                if not lines.has(**key):
                    lines.add(key | measure(kind, m, n, k))
                torch.cuda.empty_cache()


if __name__ == "__main__":
    run(main)
