"""What folding the scales of 4-bit weights into 8-bit operands costs: signal-to-noise ratios in decibels, on a CPU.

    python scripts/benchmarks/fold_cost.py [--model dit-cifar10]

For weights W, their 4-bit form W4 (groups of 64) and what the kernels of kernels/svdq_unpack.py multiply instead, W8:
W4 against W, W8 against W4, and W8 against W; first for normal random weights, then over a model's layers.
"""

from __future__ import annotations

import argparse

import torch

import ptq4dm
from ptq4dm.kernels.formats.int4 import dequantize_groups, quantize_groups
from ptq4dm.kernels.w4.unpack import PEAK
from ptq4dm.pipelines.denoiser import denoiser


def folded(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The formula of unpack.py: codes [N, K] and scales [N, K/64] -> the float32 weight of its operands."""
    used = codes.unflatten(1, (-1, 64)).any(2)
    channel = torch.where(used, scales.float(), 0).amax(1, keepdim=True) / PEAK[dtype]
    channel = torch.where(channel > 0, channel, 1.0)
    factor = (torch.where(used, scales.float(), 0) / channel).half().repeat_interleave(64, 1)
    exact = codes.half() * factor
    return (exact.round() if dtype == torch.int8 else exact.to(dtype)).float() * channel


def ratio(signal: torch.Tensor, value: torch.Tensor) -> float:
    return 10 * torch.log10(signal.square().sum() / (signal - value).square().sum()).item()


def row(name: str, weights: list[torch.Tensor]) -> None:
    columns = {"W4 : W": [], "e4m3 : W4": [], "e4m3 : W": [], "int8 : W4": [], "int8 : W": []}
    for weight in weights:
        codes, scales = quantize_groups(weight, 64, torch.bfloat16)
        four = dequantize_groups(codes, scales)
        columns["W4 : W"].append(ratio(weight, four))
        for label, dtype in (("e4m3", torch.float8_e4m3fn), ("int8", torch.int8)):
            eight = folded(codes, scales, dtype)
            columns[f"{label} : W4"].append(ratio(four, eight))
            columns[f"{label} : W"].append(ratio(weight, eight))
    means = {key: sum(values) / len(values) for key, values in columns.items()}
    print(f"{name:24}" + "".join(f"  {key} {value:5.2f}" for key, value in means.items()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="dit-cifar10")
    args = parser.parse_args()
    torch.manual_seed(0)
    row("normal, 512 x 3072", [torch.randn(512, 3072)])
    layers = [m for m in denoiser(ptq4dm.load_reference(args.model)).modules() if isinstance(m, torch.nn.Linear)]
    weights = [layer.weight.detach().float() for layer in layers if layer.in_features % 64 == 0]
    row(f"{args.model}, {len(weights)} layers", weights)


if __name__ == "__main__":
    main()
