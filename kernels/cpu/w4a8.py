"""W4A8 Linear on a CPU, from packed 4-bit weights: whole-number sums of each group, and scales after them.

    P[m, n, g] = sum_{k in g} (q_x[m, k] - z_x) (q[n, k] - z[n, g])
    y[m, n] = s_x[m] sum_g s[n, g] P[m, n, g]  +  b[n]                  scales of groups, or one a row
    y[m, n] = s_x[m] s0[n] sum_g s1[n, g] P[m, n, g]  +  b[n]           progressive: whole steps s1 of one scale a row

The sums P are exact, and so is the sum over g of steps, or of a row under one scale. Then float32: a multiply-add for
each group, g ascending, then one with s_x and b; under one scale a row the sum times it, then one with s_x and b.
Each rounds by 2^-24: y is off by at most (G + 2) 2^-24 of s_x sum_g |s P| + |b|. Its bits are the same whatever the
number of threads and rows, and for all instructions that it is compiled for.

The weight stays packed: a thread unpacks at most 128 KiB of it at a time (w4a8.cpp).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..formats.int4 import GROUP, unpack_int4
from ..formats.int8 import dynamic_scale, quantize_activation
from ..runtime.ops import op
from . import library

NAME = "cpu-w4a8"
SCALES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
SIZES = (32, 64, 128)
MOST = 1 << 15  # inputs whose products, of at most 255 * 255, have a sum in int32


def serves(device: torch.device) -> bool:
    """Whether the compiled kernel runs there; on a CPU the first who asks has it built."""
    return device.type == "cpu" and library.available()


@op
def cpu_w4a8_linear(
    x: Tensor,
    qweight: Tensor,
    wscales: Tensor,
    wzeros: Tensor | None,
    wsteps: Tensor | None,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    activation_bits: int,
) -> Tensor:
    """x [..., K] float -> [..., N] in x's dtype.

    qweight: uint8 [N, K' / 2] from `formats.int4.pack_int4(codes, 64)`, K' = K up to a multiple of 64. wscales float
    [N, G]; of a progressive weight s0, [N], with wsteps int8 [N, G] in 1..16. wzeros int8 [N, G] in [-8, 7] or None.
    G = 1 or K / 32, / 64 or / 128. bias [N]. input_scale and input_zero_point: one-element tensors, or None for
    symmetric scales by token. Without the compiled kernel it is `reference`: ask `serves`.

    Raises ValueError for sizes that do not belong together.
    """
    shapes = (None if one is None else one.shape for one in (wzeros, wsteps, bias))
    check(qweight.shape, wscales.shape, x.shape[-1], *shapes)
    rows = x.reshape(-1, x.shape[-1])
    compiled = serves(x.device) and rows.numel() and len(qweight)
    linear = _compiled if compiled else reference
    y = linear(rows, qweight, wscales, wzeros, wsteps, bias, input_scale, input_zero_point, activation_bits)
    return y.to(x.dtype).view(*x.shape[:-1], len(qweight))


@cpu_w4a8_linear.register_fake
def _(x: Tensor, qweight: Tensor, *_) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(qweight))


@functools.lru_cache(maxsize=4096)
def check(
    qweight: torch.Size, wscales: torch.Size, inputs: int, wzeros: torch.Size | None, wsteps: torch.Size | None,
    bias: torch.Size | None,
) -> None:  # fmt: skip
    """Raise ValueError for shapes that do not belong together; right ones are looked at once."""
    n, wide = qweight[0], -(-inputs // GROUP) * GROUP
    if inputs > MOST:
        raise ValueError(f"whole-number sums hold {MOST} inputs; got {inputs}.")
    if tuple(qweight) != (n, wide // 2):
        raise ValueError(f"{inputs} inputs are packed as [{n}, {wide // 2}] bytes; got {list(qweight)}.")
    by_group = wscales if wsteps is None else wsteps
    groups = by_group[-1] if by_group else 0
    if groups != 1 and (not groups or inputs % groups or inputs // groups not in SIZES):
        raise ValueError(f"{inputs} inputs have 1 group, or groups of 32, 64 or 128; got {groups} groups.")
    right = {"scales": (wscales, (n, groups) if wsteps is None else (n,)), "steps": (wsteps, (n, groups))}
    right |= {"zero points": (wzeros, (n, groups)), "bias": (bias, (n,))}
    for name, (given, shape) in right.items():
        if given is not None and tuple(given) != shape:
            raise ValueError(f"{name} of {n} outputs in {groups} groups have the shape {shape}; got {tuple(given)}.")


def reference(x, qweight, wscales, wzeros, wsteps, bias, input_scale, input_zero_point, bits) -> Tensor:
    """x [M, K] float -> float32 [M, N] by the formula, in float64, on any device: the truth."""
    scale = dynamic_scale(x.float(), (1,), bits) if input_scale is None else input_scale
    zero = torch.zeros_like(scale) if input_zero_point is None else input_zero_point
    codes = quantize_activation(x, scale, zero, bits).double() - zero
    factors = (wscales if wsteps is None else wsteps).double()
    steps = unpack_int4(qweight, GROUP)[:, : x.shape[1]].unflatten(1, (factors.shape[1], -1))
    steps = steps if wzeros is None else steps - wzeros[:, :, None]
    y = codes @ (steps * factors[:, :, None]).flatten(1).T
    y = (y if wsteps is None else y * wscales.double()) * scale.double()
    return (y if bias is None else y + bias.double()).float()


def _compiled(x, qweight, wscales, wzeros, wsteps, bias, input_scale, input_zero_point, bits) -> Tensor:
    x, qweight = x.float().contiguous(), qweight.contiguous()
    wscales = (wscales if wscales.dtype in SCALES else wscales.float()).contiguous()
    wzeros, wsteps = (None if one is None else one.contiguous() for one in (wzeros, wsteps))
    bias = None if bias is None else bias.float().contiguous()
    (m, k), n, groups = x.shape, len(qweight), (wscales if wsteps is None else wsteps).shape[1]
    y = x.new_empty(m, n)
    grid = -1.0 if input_scale is None else input_scale.item()
    zero = 0 if input_zero_point is None else int(input_zero_point.item())
    if library.found().kernels.ptq4dm_w4a8(
        at(x), at(qweight), at(wscales), SCALES[wscales.dtype], at(wzeros), at(wsteps), at(bias), at(y),
        m, n, k, groups, grid, zero, bits,
    ):  # fmt: skip
        raise MemoryError(f"no memory for the 8-bit codes of {m} rows of {k} inputs.")
    return y


def at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
