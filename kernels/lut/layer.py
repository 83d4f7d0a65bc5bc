"""Linear on binary-coded weights, as an op of torch: which kernel serves it, and running it.

cpu-lut             x86 CPU: tables of the sums of four inputs with all signs, looked up by byte shuffles
                    (kernels/cpu/lut.py)
triton-lut          CUDA, the same tables in the L1 cache (look_up.py): serves no layer, for on an H200 planes are
                    3.0 to 6.7 times as fast at one row already
triton-sign-planes  CUDA, up to SHORT rows: no tables; signs made of bits, multiplied on tensor cores (planes.py);
                    inputs of float32 are rounded to bf16
unpack + cublas     CUDA, more rows: a weight of 16 bits in memory for one call (unpack.py)
reference           everywhere: the formula on dequantized weights (reference.py); the truth
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from ..cpu import lut as cpu
from ..runtime.late import late
from ..runtime.ops import op
from ..runtime.settings import best_config, served
from .reference import check, reference

if TYPE_CHECKING:
    from . import look_up as table_launches
    from . import planes as plane_launches
    from . import unpack
else:
    late(globals(), "unpack", table_launches="look_up", plane_launches="planes")

REFERENCE, TABLES, PLANES, CUBLAS = "reference", "triton-lut", "triton-sign-planes", "unpack + cublas"
SIXTEEN = (torch.float16, torch.bfloat16)
SHORT = 16


def kernel_name(device: torch.device, rows: int | None = None) -> str:
    """Name of the kernel for so many rows of inputs on this device; rows None: many."""
    if served(device):
        return CUBLAS if rows is None or rows > SHORT else PLANES
    return cpu.NAME if cpu.serves(device) else REFERENCE


def kernel_names(device: torch.device) -> dict[str, str]:
    """The kernels by rows of inputs, for reports: {"all rows": name} where one serves them all."""
    few, many = kernel_name(device, SHORT), kernel_name(device)
    return {"all rows": few} if few == many else {f"rows <= {SHORT}": few, "more": many}


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


def looked_up(x, qweight, alphas, offsets, bias, outputs, config: dict | None = None) -> Tensor:
    """x [M, K] -> [M, N] in x's dtype of 16 bits, or else float32, by look-up tables on a GPU."""
    x = x if x.dtype in SIXTEEN else x.float()
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = x.new_empty(len(x), outputs)
    config = config or best_config("look-up.product", x.device, len(x), outputs, x.shape[1])
    table_launches.look_up(x, *_contiguous(qweight, alphas, offsets), bias, out, config)
    return out


def by_planes(x, qweight, alphas, offsets, bias, outputs, config: dict | None = None) -> Tensor:
    """x [M, K] -> [M, N] in 16 bits, on tensor cores."""
    x = plane_launches.sixteen_bits(x)
    out = x.new_empty(len(x), outputs)
    config = config or best_config("planes.product", x.device, len(x), outputs, x.shape[1])
    plane_launches.planes(x, *_contiguous(qweight, alphas, offsets), bias, out, config)
    return out


def by_cublas(x, qweight, alphas, offsets, bias, outputs) -> Tensor:
    """x [M, K] -> [M, N] in 16 bits, by a weight that is unpacked for this call."""
    x = x if x.dtype in SIXTEEN else x.bfloat16()
    weight = unpack.unpacked(*_contiguous(qweight, alphas, offsets), outputs, x.shape[1], x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if one is None else one.contiguous() for one in tensors)


_LINEAR = {REFERENCE: reference, cpu.NAME: cpu.linear, PLANES: by_planes, CUBLAS: by_cublas}
