"""A rotation of what is quantized, for kernels that quantize, in Triton (formulas: formats/rotation.py).

    v -> v diag(A (x) B) over runs of 256 inputs,    A = I (x) H_(G/16),  B = H_16        [16, 16] both

H_G = H_(G/16) (x) H_16 for both kinds and all groups G from 16 to 256, so that one kernel has two products of 16 x 16
matrices, whatever the group: 32 multiplications for each value where a dense H_256 would take 256, and 2 KB in place
of 256 KB. Runs reach beyond K where that is no multiple of 256: there v is 0. Both products are of float32, in three
TF32 parts on tensor cores ("tf32x3"): as exact as sums of float32.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats.rotation import factors

RUN = 256


@triton.jit
def rotated(v, turn_ptr):
    """v float32 [ROWS, STEP], STEP a multiple of 256 -> its runs of 256 columns times A (x) B; turn: `matrices`."""
    ROWS: tl.constexpr = v.shape[0]
    STEP: tl.constexpr = v.shape[1]
    RUNS: tl.constexpr = ROWS * STEP // 256
    place = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    inner = tl.load(turn_ptr + 256 + place)
    outer = tl.load(turn_ptr + place)
    v = tl.dot(tl.reshape(v, (RUNS * 16, 16)), inner, input_precision="tf32x3")
    v = tl.permute(tl.reshape(v, (RUNS, 16, 16)), (0, 2, 1))
    v = tl.dot(tl.reshape(v, (RUNS * 16, 16)), outer, input_precision="tf32x3")
    v = tl.permute(tl.reshape(v, (RUNS, 16, 16)), (0, 2, 1))
    return tl.reshape(v, (ROWS, STEP))


@functools.lru_cache(maxsize=64)
def matrices(group: int, kind: str, device: torch.device) -> Tensor:
    """A and B of a rotation, float32 [2, 16, 16]; kept."""
    outer, inner = factors(group, kind)
    with torch.inference_mode(False):
        whole = torch.stack([torch.kron(torch.eye(RUN // group, dtype=outer.dtype), outer), inner])
        return whole.to(device, torch.float32)
