"""Convolutions with 4-bit weights on a CPU: the compiled kernel against what else there is, in one run.

    python scripts/benchmarks/bench_cpu_w4_conv.py [--threads 1] [--shapes B,C,N,KERNEL,SIDE ...] [--json FILE]

Pictures are float32, channels last, and dynamically quantized within each call. How it is measured, and what the
columns are, says bench_cpu_w4.py; here `onednn` is int8 with one scale an output, whose packed copy is kept, and
`reference` makes the float32 weight of groups of 64 in each call.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from bench_cpu_w4 import begun, options, packed, timed, written
from torch import Tensor

from ptq4dm.errors import run
from ptq4dm.kernels.cpu.w4a8_conv import cpu_w4a8_conv2d
from ptq4dm.kernels.w8a8.layer import w8a8_conv2d
from ptq4dm.layers.int4_ops import rounded, weight_of, windows

SHAPES = {  # batch, channels, outputs, kernel, side
    "unet-cifar10": [(1, 128, 128, 3, 32), (16, 128, 128, 3, 16), (16, 256, 128, 3, 16), (16, 128, 128, 3, 8)],
    "Stable Diffusion": [(1, 320, 320, 3, 32), (2, 320, 320, 3, 64), (2, 640, 640, 3, 32), (2, 1280, 1280, 3, 16)],
}


def candidates(batch: int, channels: int, n: int, size: int, side: int) -> dict[str, Callable[[], Tensor]]:
    """Name -> a call, everything included."""
    last = partial(torch.Tensor.contiguous, memory_format=torch.channels_last)
    x, weight, bias = (
        last(torch.randn(batch, channels, side, side)),
        torch.randn(n, channels, size, size),
        torch.randn(n),
    )
    weight, kernel, k = last(weight), [size, size], channels * size * size
    geometry = ([1, 1], [size // 2, size // 2], [1, 1])
    codes, scale = last(torch.randint(-15, 16, weight.shape, dtype=torch.int8)), torch.rand(n)
    layers = {
        "row": packed(n, k, None),
        "g64": packed(n, k, 64),
        "g64 zeros": packed(n, k, 64, True),
        "progressive": packed(n, k, 64, True, True),
    }

    def reference() -> Tensor:
        made = windows(weight_of(*layers["g64"][:3], k), kernel)
        return F.conv2d(rounded(x, None, None, 8, (1, 2, 3)), made, bias, *geometry)

    calls = {
        "float32": lambda: F.conv2d(x, weight, bias, *geometry),
        "reference": reference,
        "onednn": lambda: w8a8_conv2d(x, codes, scale, bias, None, None, 8, *geometry, 1),
    }
    for name, layer in layers.items():
        calls[name] = lambda layer=layer: cpu_w4a8_conv2d(x, *layer, bias, None, None, 8, kernel, *geometry)
    return calls


@torch.no_grad()
def main() -> None:
    args = options(__doc__, "B,C,N,KERNEL,SIDE", "of convolutions, stride 1").parse_args()
    shapes, place = begun(args, SHAPES)
    rows = []
    for model, sizes in shapes.items():
        for one in sizes:
            size = dict(zip(("batch", "channels", "outputs", "kernel", "side"), one, strict=True))
            rows.append(timed(place, {"model": model, **size}, candidates(*one)))
    written(args, rows, table(rows))


def table(rows: list[dict]) -> str:
    names = [name for name in rows[0]["ratio"] if name != "float32"]
    lines = [f"{rows[0]['machine']}\n", "| pictures | convolution | float32 ms | " + " | ".join(names) + " |"]
    lines.append("|" + "---|" * (3 + len(names)))
    for row in rows:
        ratios = " | ".join(f"{row['ratio'][name]:.2f}" for name in names)
        what = f"{row['channels']} to {row['outputs']}, {row['kernel']}x{row['kernel']}"
        lines.append(
            f"| {row['batch']} of {row['side']}x{row['side']} | {what} | {row['float32_ms']:.2f} | {ratios} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
