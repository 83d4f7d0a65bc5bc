"""Time what a call of each op costs the host, beside F.linear of bf16: one JSON line an op. One GPU.

    python scripts/benchmarks/bench_host.py [--rows 64] [--calls 1000] [--json out/host.jsonl] [--profile svdq-fp8]

Medians of so many calls, in microseconds, each beside a call of F.linear with a bias just before it, so that both
find the host as busy. The GPU's queue is emptied every 50 calls, out of the time. "call_us" is of the op as layers
call it, "dispatched_us" as code of torch.compile does, through PyTorch's dispatcher; "ratio" and "dispatched_ratio"
are to F.linear. "repeated" says whether the call is repeated from a recording (kernels/runtime/replay.py), or why
not. "same" says that a repeated call gives the bits of one that is not. --profile prints where one op's time goes.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench_common import Lines
from torch.nn import functional as F

import ptq4dm
from ptq4dm.errors import UserError, run
from ptq4dm.kernels.attention.layer import kv4_attention
from ptq4dm.kernels.formats.int4 import pack_int4
from ptq4dm.kernels.formats.kv4 import quantize_kv4
from ptq4dm.kernels.lut.layer import bcq_linear
from ptq4dm.kernels.tuning import launches_lut, launches_w4
from ptq4dm.kernels.w4.from_codes import svdq_codes, svdq_product
from ptq4dm.kernels.w4.grouped import grouped_linear
from ptq4dm.kernels.w4.layer import svdq_linear
from ptq4dm.kernels.w4.progressive import progressive_linear
from ptq4dm.kernels.w8a8.from_codes import w8a8_conv2d_codes, w8a8_group_norm, w8a8_quantize
from ptq4dm.kernels.w8a8.layer import w8a8_conv2d, w8a8_linear
from ptq4dm.layers.int4_ops import int4_linear

N = K = 3072
RANK, CHANNELS, SIDE = 32, 128, 16
Case = tuple[Callable, tuple, int]  # an op, its arguments, which of them is the input


def cases(rows: int) -> dict[str, Case]:
    """name -> op and arguments."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device="cuda").bfloat16()

    def whole(low: int, high: int, *size: int) -> torch.Tensor:
        return torch.randint(low, high + 1, size, generator=generator, device="cuda", dtype=torch.int8)

    one = launches_w4.operands(rows, N, K, RANK, 0)
    x, bias = one.x, one.bias
    weight = (one.qweight, one.wscales, one.smooth, one.down, one.up, bias)
    plain = (one.qweight, one.wscales, None, None, None, bias)
    codes, scale = whole(-127, 127, N, K), torch.rand(N, device="cuda") / K
    grid = torch.full((1,), 0.02, device="cuda"), torch.full((1,), 3, device="cuda", dtype=torch.int32)
    images = normal(1, CHANNELS, SIDE, SIDE).contiguous(memory_format=torch.channels_last)
    kernel, norm = whole(-127, 127, CHANNELS, CHANNELS, 3, 3), (normal(CHANNELS).abs(), normal(CHANNELS))
    conv = (kernel, scale[:CHANNELS].clone(), bias[:CHANNELS].clone(), *grid)
    around = ([1, 1], [1, 1], [1, 1])
    packed = pack_int4(whole(-8, 7, N, K), 64)
    zeros, scales = whole(-2, 2, N, K // 128), torch.full((N, K // 128), 2.0**-9, device="cuda")
    steps, row_scales = whole(4, 8, N, K // 128), scales[:, 0].contiguous()
    key = quantize_kv4(normal(1, 16, 77, 64))
    value = quantize_kv4(normal(1, 16, 77, 64))
    made = svdq_codes(x, None, one.smooth, one.down, "fp8", 0.0, None, None, 0.0)
    flat = w8a8_quantize(images, *grid, 8, torch.int8, [1, 1], 1)
    shared = ("fp8", "", torch.bfloat16)
    return {
        "svdq-fp8": (svdq_linear, (x, *weight, "fp8", 0.0, ""), 0),
        "svdq-int8": (svdq_linear, (x, *weight, "int8", 0.0, ""), 0),
        "svdq-int4": (svdq_linear, (x, *weight, "int4", 0.0, ""), 0),
        "svdq-fp8, 16 rows": (svdq_linear, (x[:16].contiguous(), *weight, "fp8", 0.0, ""), 0),
        "w4a16": (svdq_linear, (x, *plain, "none", 0.0, ""), 0),
        "w4a16, 1 row": (svdq_linear, (x[:1].contiguous(), *plain, "none", 0.0, ""), 0),
        "svdq-codes": (svdq_codes, (x, None, one.smooth, one.down, "fp8", 0.0, None, None, 0.0), 0),
        "svdq-product": (svdq_product, (*made, one.qweight, one.wscales, one.up, bias, *shared), 2),
        "w8a8 linear": (w8a8_linear, (x, codes, scale, bias, *grid, 8), 0),
        "w8a8 linear, dynamic": (w8a8_linear, (x, codes, scale, bias, None, None, 8), 0),
        "fp8 linear, dynamic": (w8a8_linear, (x, codes.to(torch.float8_e4m3fn), scale, bias, None, None, 8), 0),
        "w8a8 conv": (w8a8_conv2d, (images, *conv, 8, *around, 1), 0),
        "w8a8 conv, dynamic": (w8a8_conv2d, (images, *conv[:3], None, None, 8, *around, 1), 0),
        "w8a8 conv of codes": (
            w8a8_conv2d_codes,
            (flat, [1, SIDE, SIDE], *conv, *around, None, None, torch.bfloat16),
            0,
        ),
        "w8a8 group norm": (
            w8a8_group_norm,
            (images, *norm, 32, 1e-5, True, *grid, 8, torch.int8, [1, 1]),
            0,
        ),
        "w4a8 int4": (int4_linear, (x, packed, scales.half(), zeros, bias, None, None, 8), 0),
        "grouped": (grouped_linear, (x, packed, scales.half(), zeros, bias), 0),
        "progressive": (progressive_linear, (x, packed, steps, zeros, row_scales, bias), 0),
        "lut": (bcq_linear, launches_lut.operands(rows, N, K, 3, 128, False, x.device, 0), 0),
        "lut, 4 rows": (bcq_linear, launches_lut.operands(4, N, K, 3, 128, False, x.device, 0), 0),
        "attention kv4": (kv4_attention, (normal(1, 16, rows, 64), *_of(key), *_of(value), None, 0.125), 0),
    }


def _of(kv) -> tuple:
    return kv.codes, kv.scales, kv.lows


def host_times(functions: list[Callable], calls: int) -> list[float]:
    """Medians of the host's microseconds in a call of each; they take turns."""
    times: list[list[int]] = [[] for _ in functions]
    for i in range(calls + 20):
        if i % 50 == 0:
            torch.cuda.synchronize()
        for taken, function in zip(times, functions, strict=True):
            start = time.perf_counter_ns()
            function()
            taken.append(time.perf_counter_ns() - start)
    return [statistics.median(taken[20:]) / 1e3 for taken in times]


def same(op: Callable, args: tuple, place: int) -> bool:
    """Whether a call gives the bits of the function as it is written, on inputs it has not seen, at other places."""
    right = True
    for seed in range(3):
        given = list(args)
        torch.manual_seed(seed)
        if args[place].dtype.is_floating_point:
            given[place] = args[place] * (0.5 + torch.rand_like(args[place]))
        else:
            given[place] = args[place].flip(0)
        made, expected = op(*given), op.__wrapped__(*given)
        pairs = zip(made, expected, strict=True) if isinstance(made, tuple) else [(made, expected)]
        right &= all(torch.equal(*(one.contiguous().view(torch.uint8) for one in pair)) for pair in pairs)
    return right


def measured(case: Case, calls: int) -> dict:
    op, args, place = case
    x, weight, bias = (torch.randn(size, device="cuda").bfloat16() for size in ((64, K), (N, K), (N,)))
    ops = torch.ops.ptq4dm
    overload = getattr(ops, f"_{op.__name__}" if hasattr(ops, f"_{op.__name__}") else op.__name__).default
    for _ in range(3):
        op(*args)
    linear, called, dispatched = host_times(
        [lambda: F.linear(x, weight, bias), lambda: op(*args), lambda: overload(*args)], calls
    )
    repeats = getattr(op, "replay", None)
    return {
        "linear_us": linear, "call_us": called, "dispatched_us": dispatched, "ratio": called / linear,
        "dispatched_ratio": dispatched / linear, "repeated": repeats.why() if repeats else {},
        "same": same(op, args, place),
    }  # fmt: skip


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--ops", nargs="+", help="names of ops; all of them if not given")
    parser.add_argument("--profile", metavar="OP", help="print where the time of this op goes, and stop")
    parser.add_argument("--json", type=Path, default=Path("out/bench-host.jsonl"))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise UserError("this times launches on a GPU, and there is none.")
    known = cases(args.rows)
    if unknown := {*(args.ops or ()), *([args.profile] if args.profile else ())} - known.keys():
        raise UserError(f"no op is called {', '.join(sorted(unknown))}; there are {', '.join(known)}.")
    if args.profile:
        op, given, _ = known[args.profile]
        host_times([lambda: op(*given)], 20)
        with cProfile.Profile() as profile:
            host_times([lambda: op(*given)], args.calls)
        pstats.Stats(profile).sort_stats("tottime").print_stats(30)
        return
    made_with = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "ptq4dm": ptq4dm.__version__}
    lines = Lines(args.json, made_with | {"rows": args.rows, "calls": args.calls})
    for name in args.ops or known:
        if lines.has(op=name):
            continue
        row = measured(known[name], args.calls)
        lines.add({"op": name} | {key: round(v, 2) if isinstance(v, float) else v for key, v in row.items()})


if __name__ == "__main__":
    run(main)
