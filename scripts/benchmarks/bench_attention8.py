"""Time attention on 8-bit operands against torch's in bf16, in one run, and compare both with float32.

    python scripts/benchmarks/bench_attention8.py [--shapes flux video sdxl] [--settings] [--output FILE]

A line of JSON for each shape: milliseconds, TFLOP/s and errors of

    cudnn, flash        scaled_dot_product_attention in bf16 by these backends
    int8, e4m3          the op, codes included (kernels/attention/layer8.py)
    int8 codes, ...     of it the codes alone
    int8 products, ...  and the products alone
    sdpa turned, ...    of FLUX with what comes before: norms of queries and keys, a text's tokens before an image's,
                        rotary embedding; by torch.compile before torch's attention, and in the kernel of the codes
    with --settings     codes and products with other settings too

Every time is the median over replays of a CUDA graph; the candidates of a shape take turns. Errors are of the first
queries, on normal operands with a common mean of keys, beside float32. What one kernel cannot do is told beside the
figures of the others ("problems").
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from bench_common import Lines, error, made_with
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ptq4dm.errors import UserError, run
from ptq4dm.kernels.attention import codes8, product8
from ptq4dm.kernels.attention.layer8 import GLUON, REFERENCE, attention8, kernel_name
from ptq4dm.kernels.attention.rotary import Rotary
from ptq4dm.kernels.formats.attention8 import TYPES
from ptq4dm.kernels.tuning.stopwatch import graph_of, race
from ptq4dm.layers.attention.faster import in_sixteen_bits

SHAPES = {  # B, H, tokens, d
    "flux": (1, 24, 4608, 128),
    "video": (1, 40, 32760, 128),
    "sdxl": (2, 10, 4096, 64),
}
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
CODES = [{"warps": warps, "heads": heads} for heads in (1, 2, 4, 6) for warps in (8, 16)]
SETTINGS = [(stages, 0, split) for stages in (3, 4, 5) for split in (False, True)] + [
    (3, n, False) for n in (16, 32, 64)
]
CHECKED = 256


def operands(batch: int, heads: int, tokens: int, width: int, mean: float = 2.0):
    """Queries, keys and values as diffusers has them, views of [B, tokens, H, d]."""
    generator = torch.Generator("cuda").manual_seed(0)
    normal = functools.partial(torch.randn, generator=generator, device="cuda")
    q, k, v = (normal(batch, tokens, heads, width) for _ in range(3))
    k = k + mean * normal(batch, 1, heads, width)
    return tuple(x.to(torch.bfloat16).transpose(1, 2) for x in (1.5 * q, k, v))


def by_torch(backend: SDPBackend, q, k, v):
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v)


def told(setting: dict) -> str:
    return ", ".join(f"{value} {name}" for name, value in setting.items())


def products(kind: str, given: tuple, scale: float, setting: dict | None) -> Callable[[], Tensor]:
    """The products of a call alone, on codes that are made before; setting: of the kernel, None for its own."""
    q, k, _ = given
    codes = codes8.quantize8(*given, scale, TYPES[kind])
    y = q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3])
    multiply: Callable = product8.attention
    if kernel_name(q.device, q.shape[-1]) == GLUON:
        from ptq4dm.kernels.attention import product8_hopper

        multiply = product8_hopper.attention

    def call() -> Tensor:
        multiply(codes, y, k.shape[2], setting)
        return y.transpose(1, 2)

    return call


def candidates(given: tuple, scale: float, settings: bool) -> dict[str, Callable]:
    """name -> a call; those whose names are of one word give the attention of `given`."""
    calls = {name: functools.partial(by_torch, backend, *given) for name, backend in BACKENDS.items()}
    for kind, dtype in TYPES.items():
        calls[kind] = functools.partial(attention8, *given, scale, kind)
        calls[f"{kind} codes"] = functools.partial(codes8.quantize8, *given, scale, dtype)
        calls[f"{kind} products"] = products(kind, given, scale, None)
        if settings and kind == "int8":
            for setting in CODES:
                calls[f"{kind} codes, {told(setting)}"] = functools.partial(
                    codes8.quantize8, *given, scale, dtype, setting
                )
        if settings and kernel_name(given[0].device, given[0].shape[-1]) == GLUON:
            for stages, hand, split in SETTINGS:
                name = f"{kind} products, {stages} stages{', shared' * split}{f', {hand} handed over' * (hand > 0)}"
                calls[name] = products(
                    kind, given, scale, {"BN": 128, "STAGES": stages, "HAND": hand, "SPLIT": split}
                )
    return calls


def turned(given: tuple, settings: bool) -> dict[str, Callable]:
    """The same operands of which the first 512 tokens are a text's, before norms and rotary embedding."""
    words, width = 512, given[0].shape[-1]
    text, image = (tuple(x[:, :, part] for x in given) for part in (slice(words), slice(words, None)))
    angles = torch.rand(given[0].shape[2], width // 2, device="cuda") * 6
    places = (x.repeat_interleave(2, 1).contiguous() for x in (angles.cos(), angles.sin()))
    norms = [torch.ones(width, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    rotary = Rotary(*norms[:2], *places, 1e-6, (*text, *norms[2:]))
    scale = width**-0.5
    calls = {"sdpa turned": functools.partial(in_sixteen_bits, *image, scale, rotary)}
    for setting in [{}, *CODES] if settings else [{}]:
        name = f"int8 codes turned, {told(setting)}" if setting else "int8 codes turned"
        calls[name] = functools.partial(codes8.quantize8, *image, scale, torch.int8, setting, rotary)
    for kind in TYPES:
        calls[f"{kind} turned"] = functools.partial(attention8, *image, scale, kind, *rotary[:5], *rotary.words)
    return calls


def measured(shape: tuple[int, int, int, int], settings: bool) -> dict:
    given, scale = operands(*shape), shape[-1] ** -0.5
    calls, problems = {}, {}
    every = candidates(given, scale, settings) | (turned(given, settings) if shape == SHAPES["flux"] else {})
    for name, call in every.items():
        try:
            graph_of([call])
        except Exception as problem:
            problems[name] = f"{type(problem).__name__}: {problem}"[:300]
        else:
            calls[name] = call
    times = race({name: [call] for name, call in calls.items()})
    operations = 4 * shape[0] * shape[1] * shape[2] ** 2 * shape[3]
    few = tuple(x.float() for x in (given[0][:, :, :CHECKED], *given[1:]))
    right = scaled_dot_product_attention(*few)
    rows = {name: {"ms": round(times[name] / 1e3, 4)} for name in calls}
    for name, call in calls.items():
        if "codes" not in name:
            rows[name]["tflops"] = round(operations / times[name] / 1e6, 1)
        if "codes" not in name and "turned" not in name:
            rows[name]["error"] = round(error(call()[:, :, :CHECKED].float(), right), 5)
    return rows | ({"problems": problems} if problems else {})


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--settings", action="store_true", help="other settings too, which takes minutes")
    parser.add_argument("--output", type=Path, default=Path("out/bench-attention8.jsonl"))
    args = parser.parse_args()
    if not torch.cuda.is_available() or kernel_name(torch.device("cuda"), 128) == REFERENCE:
        raise UserError("no kernel of this GPU serves attention on 8-bit operands: nothing to time.")
    lines = Lines(args.output, made_with())
    for name in args.shapes:
        kernel = kernel_name(torch.device("cuda"), SHAPES[name][-1])
        about = {"shape": name, "sizes": list(SHAPES[name]), "kernel": kernel, "settings": args.settings}
        if not lines.has(**about):
            lines.add(about | measured(SHAPES[name], args.settings))


if __name__ == "__main__":
    run(main)
