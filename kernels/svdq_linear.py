"""The op behind SVDQuant's layers on a GPU: which Triton kernels serve a layer, and running them.

    triton-w4a8-fp8     fp8 activations on tensor cores that know e4m3 (compute capability 8.9 and later)
    triton-w4a8-int8    int8 activations; fp8 ones on GPUs before that
    reference           everything else: the formula in float32 (svdq.py); the truth

Inputs of float32 or float64 are rounded to bf16 first. Every sum has a fixed order: the same bits in every run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .tuning import best_config, capability

REFERENCE, FP8, INT8 = "reference", "triton-w4a8-fp8", "triton-w4a8-int8"


def kernel_name(device: torch.device, activation: str, group_size: int) -> str:
    """What serves a layer of this activation format ("fp8", "int8", "int4", "none") on this device."""
    if device.type != "cuda" or group_size != 64 or capability(device) < (8, 0):
        return REFERENCE
    return {"fp8": FP8 if capability(device) >= (8, 9) else INT8, "int8": INT8}.get(activation, REFERENCE)


@torch.library.custom_op("ptq4dm::svdq_linear", mutates_args=())
def svdq_linear(
    x: Tensor,
    qweight: Tensor,
    wscales: Tensor,
    smooth: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    bias: Tensor | None,
    activation: str,
    shift: float,
) -> Tensor:
    """x [..., K] float on a GPU -> [..., N] in x's dtype; the arguments of `svdq.svdq_linear`, groups of 64.

    Raises ValueError where no Triton kernel serves them: `kernel_name` says.
    """
    name = kernel_name(x.device, activation, 2 * qweight.shape[1] // wscales.shape[1])
    if name == REFERENCE:
        raise ValueError(f"no kernel for {activation} activations on {x.device}; call svdq.svdq_linear instead.")
    y = rows_through(name, x.reshape(-1, x.shape[-1]), qweight, wscales, smooth, down, up, bias, shift)
    return y.to(x.dtype).reshape(*x.shape[:-1], len(qweight))


@svdq_linear.register_fake
def _(x, qweight, wscales, smooth, down, up, bias, activation, shift):
    return x.new_empty(*x.shape[:-1], len(qweight))


def rows_through(name: str, x, qweight, wscales, smooth, down, up, bias, shift: float) -> Tensor:
    """x [M, K] -> [M, N] in bf16 or fp16 by the kernels called `name`."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        x = x.bfloat16()
    if x.stride(-1) != 1:
        x = x.contiguous()
    out = x.new_empty(len(x), len(qweight))
    if not out.numel():
        return out
    down, up = (None if half is None else half.to(x.dtype).contiguous() for half in (down, up))
    w4a8(name, x, qweight, wscales, smooth, down, up, bias, shift, out)
    return out


def w4a8(name: str, x, qweight, wscales, smooth, down, up, bias, shift: float, out: Tensor) -> None:
    from . import svdq_activation, svdq_gemm, svdq_unpack

    mode = "fp8" if name == FP8 else "int8"
    dtype = torch.float8_e4m3fn if name == FP8 else torch.int8
    sizes = (x.device, len(x), len(qweight), x.shape[1])
    config = best_config(f"{mode}.prepare", *sizes)
    activation = svdq_activation.empty_activation(x, mode, 0 if down is None else len(down), dtype)
    weight = svdq_unpack.empty_weight(qweight, dtype)
    svdq_unpack.prepare(x, smooth, down, mode, shift, activation, qweight, wscales, weight, config)
    svdq_gemm.product(activation, weight, up, bias, out, best_config(f"{mode}.product", *sizes))
