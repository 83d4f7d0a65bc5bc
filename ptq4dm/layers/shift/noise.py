"""Noise for stochastic rounding, from torch's generator of the device as dropout's is: who seeds it has it again."""

from __future__ import annotations

import torch
from torch import Tensor


def uniform(x: Tensor) -> Tensor:
    """float32 of x's shape, uniform in [0, 1).

    On a CPU in steps of 2^-16, four from each 64-bit number drawn, in half the time of `torch.rand`: what a mean is
    off by is at most 2^-17 of a step.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.rand_like(x, dtype=torch.float32)
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    shorts = words.view(torch.int16)[: x.numel()].view(x.shape)
    return shorts.float().mul_(2.0**-16).add_(0.5 + 2.0**-17)
