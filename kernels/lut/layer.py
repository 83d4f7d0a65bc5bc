"""Linear on binary-coded weights, as an op of torch: which kernel serves it, and running it.

cpu-lut             x86 CPU: tables of the sums of four inputs with all signs, looked up by byte shuffles
                    (kernels/cpu/lut.py)
reference           everywhere: the formula on dequantized weights (reference.py); the truth
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..cpu import lut as cpu
from ..runtime.ops import op
from .reference import check, reference

REFERENCE = "reference"


def kernel_name(device: torch.device, rows: int | None = None) -> str:
    """Name of the kernel for so many rows of inputs on this device; rows None: many."""
    return cpu.NAME if cpu.serves(device) else REFERENCE


@op
def bcq_linear(
    x: Tensor, qweight: Tensor, alphas: Tensor, offsets: Tensor | None, bias: Tensor | None, outputs: int
) -> Tensor:
    """x [..., K] float -> [..., N] in x's dtype.

    qweight int32 [T, W, q, 64], alphas [T, G, q, 64] float, offsets [T, G, 64] or None: tiles as formats/bcq.py has
    them; G = 1 or K / 32, / 64 or / 128. bias [N]. outputs: N.

    Raises ValueError for sizes that do not belong together.
    """
    shapes = (None if one is None else one.shape for one in (offsets, bias))
    check(qweight.shape, alphas.shape, *shapes, outputs, x.shape[-1])
    rows = x.reshape(-1, x.shape[-1])
    name = kernel_name(x.device, len(rows)) if rows.numel() and outputs else REFERENCE
    y = _LINEAR[name](rows, qweight, alphas, offsets, bias, outputs)
    return y.to(x.dtype).view(*x.shape[:-1], outputs)


@bcq_linear.register_fake
def _(x, qweight, alphas, offsets, bias, outputs):
    return x.new_empty(*x.shape[:-1], outputs)


_LINEAR = {REFERENCE: reference, cpu.NAME: cpu.linear}
