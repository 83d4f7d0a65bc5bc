"""Time attention on a text's 4-bit keys and values against torch's on 16-bit ones, in one run.

    python scripts/benchmarks/bench_kv4.py [--tune SECONDS] [--shapes sdxl-4096 pixart ...] [--images 1 4]
        [--output out/bench-kv4]

One JSON line for each shape and number of images, each with and without a prompt (guidance): microseconds and ratios
to the first. A line that this card and commit have measured already is not measured again. Every time is the median
over replays of a CUDA graph on operands that no cache holds; the candidates of a shape take turns.

    sdpa                scaled_dot_product_attention in bf16, on keys and values that are kept in bf16
    unpacked, sdpa      the same on keys and values that are kept in 4 bits and unpacked in every call, in one kernel
                        that torch.compile makes; 16-bit copies of them are in memory while it runs
    kv4                 the kernel on the 4-bit ones (kernels/attention)

Shapes are layers of SDXL, PixArt and Wan. "pixart-padded" has the mask of a prompt of 100 tokens, as diffusers makes
it. "error" is the distance of the kernel's first rows to the formula, beside what sdpa's are from float32 on the same
keys and values. "us of storing": what it takes to round keys and values once for a prompt, launch by launch, as
`ptq4dm.cached_text` does it and to the nearest. --tune first searches settings for these shapes, for so many seconds,
and records them where kernels look; the file goes to --output as well.
"""

from __future__ import annotations

import argparse
import functools
import time
from dataclasses import replace
from pathlib import Path

import torch
from bench_common import Lines, error, made_with
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ptq4dm.caching.four_bits import keys_in_4_bits, values_in_4_bits
from ptq4dm.cli.benches.tune import check_gpu, tune
from ptq4dm.errors import UserError, run
from ptq4dm.kernels.attention import reference
from ptq4dm.kernels.attention.layer import kv4_attention
from ptq4dm.kernels.formats.kv4 import KV4, dequantize_kv4, quantize_kv4
from ptq4dm.kernels.runtime.settings import best_config, tuned_file
from ptq4dm.kernels.tuning.launches_attention import AttentionLaunch, operands, sets_of
from ptq4dm.kernels.tuning.stopwatch import launched, race

SHAPES = {  # of one picture with guidance
    "sdxl-4096": AttentionLaunch(2, 10, 4096, 77, 64),
    "sdxl-1024": AttentionLaunch(2, 20, 1024, 77, 64),
    "pixart": AttentionLaunch(2, 16, 4096, 300, 72),
    "pixart-padded": AttentionLaunch(2, 16, 4096, 300, 72),
    "wan": AttentionLaunch(2, 40, 8190, 512, 128),
}
STORES = {
    "cached_text": lambda one: (keys_in_4_bits(one.floats[0]), values_in_4_bits(one.floats[1])),
    "nearest": lambda one: [quantize_kv4(x) for x in one.floats],
}
WORDS, CHECKED = 100, 64  # of a padded prompt; rows that are compared with the formula


class Set:
    """Operands of a layer in all forms."""

    def __init__(self, launch: AttentionLaunch, padded: bool, seed: int):
        self.scale = launch.width**-0.5
        self.q, *self.floats = operands(launch, seed)
        self.codes = [quantize_kv4(one) for one in self.floats]
        self.mask = None
        if padded:
            kept = torch.arange(launch.tokens, device=self.q.device) < WORDS
            self.mask = ((~kept).to(torch.bfloat16) * -10000.0).expand(launch.batch, launch.heads, 1, -1)

    def sdpa(self, key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(self.q, key, value, attn_mask=self.mask, scale=self.scale)

    def on_floats(self) -> Tensor:
        return self.sdpa(*self.floats)

    def kv4(self) -> Tensor:
        return kv4_attention(self.q, *self.codes[0], *self.codes[1], self.mask, self.scale)


def unpacked(parts: tuple[Tensor, ...], width: int) -> tuple[Tensor, Tensor]:
    """Keys and values in bf16."""
    key, value = (dequantize_kv4(KV4(*one), width).to(torch.bfloat16) for one in (parts[:3], parts[3:]))
    return key, value


def checked(one: Set, width: int) -> dict[str, float]:
    """Relative distances of the first rows. Raises UserError where the kernel is too far from the formula."""
    few = one.q[:, :, :CHECKED].float()
    formula = reference.attention(few, *one.codes, one.mask, one.scale)
    exact = dequantize_kv4(one.codes[0], width), dequantize_kv4(one.codes[1], width)
    mask = None if one.mask is None else one.mask.float()
    right = scaled_dot_product_attention(few, *exact, attn_mask=mask, scale=one.scale)
    found = {"kv4": error(one.kv4()[:, :, :CHECKED], formula)}
    found["sdpa"] = error(one.sdpa(*(part.bfloat16() for part in exact))[:, :, :CHECKED], right)
    if not found["kv4"] < 1e-2:
        raise UserError(f"the kernel is wrong: {found}.")
    return {name: float(f"{value:.2g}") for name, value in found.items()}


def measure(launch: AttentionLaunch, padded: bool) -> dict:
    sets = [Set(launch, padded, seed) for seed in range(sets_of(launch))]
    torch.compiler.reset()  # it compiles one function for few shapes only, and then runs it as it is
    compiled = torch.compile(unpacked, dynamic=False)

    def made_each_time(one: Set) -> Tensor:
        return one.sdpa(*compiled((*one.codes[0], *one.codes[1]), launch.width))

    candidates = {"sdpa": Set.on_floats, "unpacked, sdpa": made_each_time, "kv4": Set.kv4}
    errors = checked(sets[0], launch.width)
    storing = {name: launched(functools.partial(store, sets[0])) for name, store in STORES.items()}
    times = race({name: [functools.partial(call, one) for one in sets] for name, call in candidates.items()}, 7)
    operations = 4 * launch.batch * launch.heads * launch.rows * launch.tokens * launch.width
    return {
        "us": {name: round(spent, 1) for name, spent in times.items()},
        "ratio to sdpa": {name: round(times["sdpa"] / spent, 3) for name, spent in times.items()},
        "TFLOP/s": {name: round(operations / spent / 1e6, 1) for name, spent in times.items()},
        "error": errors,
        "us of storing": {name: round(spent, 1) for name, spent in storing.items()},
        "bytes of keys and values": {
            "sdpa": sum(one.numel() * 2 for one in sets[0].floats),
            "kv4": sum(part.numel() * part.element_size() for one in sets[0].codes for part in one),
        },
        "settings": best_config("kv4.attention", torch.device("cuda"), *launch.key),
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--images", type=int, nargs="+", default=[1, 4], help="at once, each with guidance")
    parser.add_argument("--tune", type=float, metavar="SECONDS", help="search settings first")
    parser.add_argument("--output", type=Path, default=Path("out/bench-kv4"))
    args = parser.parse_args()
    check_gpu()
    if min(args.images) < 1:
        raise UserError("--images counts pictures, from 1.")
    if args.tune:
        wanted = dict.fromkeys(SHAPES[name] for name in args.shapes)
        tune(list(wanted), None, args.tune)
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / tuned_file().name).write_text(tuned_file().read_text())
    lines = Lines(args.output / "bench_kv4.jsonl", made_with())
    for name in args.shapes:
        for images in args.images:
            launch = replace(SHAPES[name], batch=SHAPES[name].batch * images)
            settings = best_config("kv4.attention", torch.device("cuda"), *launch.key)
            if lines.has(shape=name, images=images, settings=settings):
                continue
            began = time.monotonic()
            sizes = {"heads": launch.heads, "queries": launch.rows, "tokens": launch.tokens, "width": launch.width}
            row = {"shape": name, "images": images} | sizes | measure(launch, "padded" in name)
            lines.add(row | {"seconds": round(time.monotonic() - began, 1)})
            torch.cuda.empty_cache()


if __name__ == "__main__":
    run(main)
