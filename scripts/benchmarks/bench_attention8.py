"""Time attention on 8-bit operands against torch's in bf16, in one run, and compare both with float32.

    python scripts/benchmarks/bench_attention8.py [--shapes flux video sdxl] [--output FILE]

A line of JSON for each shape: milliseconds, TFLOP/s and errors of

    cudnn, flash        scaled_dot_product_attention in bf16 by these backends
    int8, e4m3          the op, codes included (kernels/attention/layer8.py), and of it the codes alone

Every time is the median over replays of a CUDA graph; the candidates of a shape take turns. Errors are of the first
queries, on normal operands with a common mean of keys, beside float32.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from pathlib import Path

import torch
from bench_common import error
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ptq4dm.kernels.attention import codes8
from ptq4dm.kernels.attention.layer8 import REFERENCE, attention8, kernel_name
from ptq4dm.kernels.formats.attention8 import TYPES
from ptq4dm.kernels.tuning.stopwatch import race

SHAPES = {  # B, H, tokens, d
    "flux": (1, 24, 4608, 128),
    "video": (1, 40, 32760, 128),
    "sdxl": (2, 10, 4096, 64),
}
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
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


def measured(shape: tuple[int, int, int, int]) -> dict:
    given, scale = operands(*shape), shape[-1] ** -0.5
    calls = {name: functools.partial(by_torch, backend, *given) for name, backend in BACKENDS.items()}
    codes = {}
    for kind, dtype in TYPES.items():
        calls[kind] = functools.partial(attention8, *given, scale, kind)
        codes[f"{kind} codes"] = functools.partial(codes8.quantize8, *given, scale, dtype)
    times = race({name: [call] for name, call in (calls | codes).items()})
    operations = 4 * shape[0] * shape[1] * shape[2] ** 2 * shape[3]
    few = tuple(x.float() for x in (given[0][:, :, :CHECKED], *given[1:]))
    right = scaled_dot_product_attention(*few)
    rows = {name: {"ms": round(times[name] / 1e3, 4)} for name in calls | codes}
    for name, call in calls.items():
        rows[name]["tflops"] = round(operations / times[name] / 1e6, 1)
        rows[name]["error"] = round(error(call()[:, :, :CHECKED].float(), right), 5)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--output", help="file that lines are added to as well")
    args = parser.parse_args()
    if not torch.cuda.is_available() or kernel_name(torch.device("cuda"), 128) == REFERENCE:
        sys.exit("no kernel of this GPU serves attention on 8-bit operands: nothing to time.")
    for name in args.shapes:
        about = {"shape": name, "sizes": SHAPES[name], "gpu": torch.cuda.get_device_name()}
        line = json.dumps(
            about | {"kernel": kernel_name(torch.device("cuda"), SHAPES[name][-1])} | measured(SHAPES[name])
        )
        print(line, flush=True)
        if args.output:
            with Path(args.output).open("a") as file:
                print(line, file=file)


if __name__ == "__main__":
    main()
